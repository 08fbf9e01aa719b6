"""Verbs that write weights."""

from __future__ import annotations

import argparse
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from fd_scale.cli.parts import Verbs, add_format, add_verb
from fd_scale.config import ModelConfig
from fd_scale.errors import UserError


def add_weights(verbs: Verbs) -> None:
    """Adds `export`, `convert` and `interpolate`."""
    export = add_verb(
        verbs, "export", "the trained backbone alone, as safetensors with a model card",
        "Writes model.safetensors (fp32; formats official and fd: model.pth), config.json and README.md.\n"
        "Recipes take the folder, in any format, as model.weights. Format timm has a classifier's head, where timm's\n"
        "own model computes the same; the others are the backbone alone.",
        "  fd-scale export runs/digits/distill out\n"
        "  fd-scale export runs/digits/distill out --format hf",
    )  # fmt: skip
    export.add_argument("run_dir", metavar="RUN", help="folder of a run")
    export.add_argument("out", metavar="OUT", help="folder to write")
    add_format(export)
    export.set_defaults(run=_export)

    convert = add_verb(
        verbs, "convert", "weights in another layout of names",
        "Reads a file or folder in any layout that the model knows, writes a folder as `export` does, without a card.",
        "  fd-scale convert swinv2.pth out --model swin_v2_base --set shared_bias=false --format timm",
    )  # fmt: skip
    convert.add_argument("source", metavar="IN", help=".safetensors or .pth file, or a folder")
    convert.add_argument("out", metavar="OUT", help="folder to write")
    convert.add_argument("--model", required=True, help="name of the model that the weights are of")
    convert.add_argument(
        "--img-size", type=int, help="side of its input in pixels (default: the model's own)"
    )
    convert.add_argument(
        "--set", metavar="key=value", nargs="+", action="extend", default=[],
        help="arguments of the model, as model.overrides",
    )  # fmt: skip
    add_format(convert)
    convert.set_defaults(run=_convert)

    interpolate = add_verb(
        verbs, "interpolate", "a mean of two models' weights (WiSE-FT)",
        "Writes (1 - alpha) * A + alpha * B in fp32, tensor by tensor (arXiv 2109.01903).",
        "  fd-scale interpolate runs/distilled-export runs/finetuned-export out --alpha 0.5",
    )  # fmt: skip
    interpolate.add_argument("first", metavar="A", help="weights: a file or a folder")
    interpolate.add_argument("second", metavar="B", help="weights with the same names and shapes")
    interpolate.add_argument("out", metavar="OUT", help="folder to write")
    interpolate.add_argument("--alpha", type=float, default=0.5, help="share of B, 0..1 (default: 0.5)")
    interpolate.set_defaults(run=_interpolate)


def _export(options: argparse.Namespace) -> None:
    from fd_scale import api

    print(api.export(options.run_dir, options.out, options.format))


def _convert(options: argparse.Namespace) -> None:
    from fd_scale.verbs.export import convert

    config = ModelConfig(name=options.model, img_size=options.img_size, overrides=_values(options.set))
    print(convert(options.source, options.out, config, options.format))


def _values(items: list[str]) -> dict[str, Any]:
    """Arguments of a model from `key=value`, values as in YAML."""
    for item in items:
        if "=" not in item:
            raise UserError(f"--set {item}: an argument is written key=value, e.g. depth=12")
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist(items))
    except YAMLError as error:
        raise UserError(f"--set {' '.join(items)}: not YAML: {' '.join(str(error).split())}") from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _interpolate(options: argparse.Namespace) -> None:
    from fd_scale.verbs.export import interpolate

    print(interpolate(options.first, options.second, options.out, options.alpha))
