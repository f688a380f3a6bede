"""edc_hub: condense an image-classification set to a few images a class, and publish the result as a dataset."""

__version__ = "0.1.0"
