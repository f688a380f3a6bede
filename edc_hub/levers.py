"""The sections inside `synthesize`: choices of a method that have keys of their own."""

from typing import Literal

from pydantic import Field

from .section import Above, Count, Decay, Fraction, Rate, Section


class Flatness(Section):
    """Flatness regularisation, EDC section 3.2, Eq. 7 and Table 4."""

    kind: Literal["none", "logits", "statistics", "sam"] = Field(
        "none", description="L'_FR: logits of the averaged images | L_FR: their statistics | sharpness-aware steps"
    )
    weight: Rate = Field(0.25, description="weight of the term (Table 4); sam has none")
    beta: Decay = Field(0.99, description="decay of the image average (Table 4; 0.999 for some rows of statistics)")
    tau: Above = Field(4.0, description="temperature (Table 4)")
    direction: Literal["paper", "code"] = Field("paper", description="KL(X || EMA) as printed, or KL(EMA || X)")
    reduction: Literal["batchmean", "mean"] = Field("batchmean", description="mean also divides by the classes")
    rho: Rate = Field(
        0.05,
        description="radius of sam: root mean square over the block, in units of std (Table 4 names none)",
    )


class Densification(Section):
    """Data densification of G-VBSM: the Gram spectrum of a class's images, distilled from a flatter copy of itself."""

    weight: Rate = Field(0.0, description="weight of the term; 0: off")
    tau: Above = Field(4.0, description="temperature of the target spectrum")


class Curriculum(Section):
    """Crop curriculum of CDA: crops are large at first, and their smallest area comes down to `crop_area`."""

    kind: Literal["none", "cosine", "linear", "step"] = Field("none", description="way down; step: at the milestone")
    start: Fraction = Field(1.0, description="smallest area at the first step")
    milestone: Fraction = Field(1.0, description="share of the iterations after which it is crop_area's")


class Residual(Section):
    """Residual connection of FADRM: now and then the images are merged with what they started from."""

    every: Count = Field(
        0,
        description="steps between merges, none after the last step; 0: never (FADRM: 500 of 2000)",
    )
    weight: Fraction = Field(0.5, description="weight of the initial image in a merge (FADRM: 0.5)")
