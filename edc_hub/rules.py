from .recipe import Recipe


def validate(recipe: Recipe) -> None: pass
