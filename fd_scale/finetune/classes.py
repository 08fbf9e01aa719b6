"""How many classes a task has, and that its sources agree on them."""

from __future__ import annotations

from fd_scale.config import Recipe
from fd_scale.data import Source
from fd_scale.errors import UserError


def agreed_classes(
    recipe: Recipe, configured: int | None, source: Source | None, evaluation: Source | None, least: int = 2
) -> int:
    """Returns the number of classes of a recipe's task.

    Args:
        recipe: of a task that learns classes.
        configured: `num_classes` of the task's section.
        source: training images; none: the recipe says how many classes there are.
        evaluation: images that metrics are measured on; none: there are none.
        least: classes that the task makes sense for.

    Raises:
        UserError: there are fewer, or setting and sources differ.
    """
    if source is not None:
        if source.num_classes < least:
            raise UserError(
                f"data.train: {recipe.data.train} has {source.num_classes} classes; {recipe.task} needs labels"
            )
        if configured not in (None, source.num_classes):
            raise UserError(
                f"{recipe.task}.num_classes: got {configured}, and {recipe.data.train} has {source.num_classes}; "
                "give the data that are meant, or remove it"
            )
        if evaluation is not None:
            require_same_classes(recipe, source, evaluation)
        return source.num_classes
    assert configured is not None, "without a source the recipe says how many classes there are"
    if evaluation is not None and evaluation.num_classes != configured:
        raise UserError(
            f"data.evaluation: {recipe.data.evaluation} has {evaluation.num_classes} classes and the model "
            f"{configured}; expected as many"
        )
    return configured


def require_same_classes(recipe: Recipe, train: Source, evaluation: Source) -> None:
    """Refuses an evaluation source with other classes: its labels would mean something else.

    Raises:
        UserError: numbers or names differ.
    """
    theirs, ours = evaluation.class_names, train.class_names
    if evaluation.num_classes != train.num_classes or (theirs and ours and theirs != ours):
        differing = sorted(set(theirs or ()) ^ set(ours or ()))[:5]
        raise UserError(
            f"data.evaluation: {recipe.data.evaluation} has {evaluation.num_classes} classes and "
            f"{recipe.data.train} has {train.num_classes}{f' (only in one: {differing})' if differing else ''}; "
            "expected the same ones"
        )
