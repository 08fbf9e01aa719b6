"""How many classes a task has, and that its sources agree on them."""

from __future__ import annotations

from fd_scale.config import Recipe
from fd_scale.data import Source
from fd_scale.errors import UserError
from fd_scale.evaluation import EvaluationSet


def agreed_classes(
    recipe: Recipe,
    configured: int | None,
    source: Source | None,
    evaluation: EvaluationSet | None,
    least: int = 2,
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
                f"data.train: {recipe.data.train} has {source.num_classes} classes; {recipe.task} needs labels: class "
                "folders, .cls files in tar shards, or in parquet files a column of integers named label, labels, "
                "fine_label or coarse_label"
            )
        if configured not in (None, source.num_classes):
            raise UserError(
                f"{recipe.task}.num_classes: got {configured}, and {recipe.data.train} has {source.num_classes}; "
                "give the data that are meant, or remove it"
            )
        if evaluation is not None:
            require_same_classes(recipe, source, evaluation.source)
        return source.num_classes
    assert configured is not None, "without a source the recipe says how many classes there are"
    if evaluation is not None and evaluation.source.num_classes != configured:
        raise UserError(
            f"data.evaluation: {recipe.data.evaluation} has {evaluation.source.num_classes} classes and the model "
            f"{configured}; expected as many"
        )
    return configured


def require_same_classes(recipe: Recipe, train: Source, evaluation: Source) -> None:
    """Refuses an evaluation source with other classes: its labels would mean something else.

    Raises:
        UserError: numbers or names differ.
    """
    if evaluation.num_classes != train.num_classes or _differ(evaluation.class_names, train.class_names):
        raise UserError(
            f"data.evaluation: {recipe.data.evaluation} has {evaluation.num_classes} classes and {recipe.data.train} "
            f"has {train.num_classes}{_differing(evaluation.class_names, train.class_names)}; expected the same ones"
        )


def require_trained_classes(recipe: Recipe, evaluation: Source, trained: list[str] | None) -> None:
    """Refuses an evaluation source with other classes than a run was trained on, as far as both have names.

    Raises:
        UserError: names differ.
    """
    if _differ(evaluation.class_names, trained):
        raise UserError(
            f"data.evaluation: {recipe.data.evaluation} has other classes than the run was trained on"
            f"{_differing(evaluation.class_names, trained)}; expected the same ones"
        )


def _differ(theirs: list[str] | None, ours: list[str] | None) -> bool:
    """Numbers from 0, as ImageNet-V2 has them, name no class but its place."""
    numbers = [[str(place) for place in range(len(names))] for names in (theirs or (), ours or ())]
    return bool(theirs and ours and theirs != ours and theirs != numbers[0] and ours != numbers[1])


def _differing(theirs: list[str] | None, ours: list[str] | None) -> str:
    if not (theirs and ours):
        return ""
    alone = sorted(set(theirs) ^ set(ours))[:5]
    return f" (only in one: {alone})" if alone else " (in another order)" if theirs != ours else ""
