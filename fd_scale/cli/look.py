"""Verbs that look into what was trained."""

from __future__ import annotations

import argparse

from fd_scale.cli.parts import Verbs, add_overrides, add_verb


def add_looking(verbs: Verbs) -> None:
    """Adds `diagnose`, `landscape`, `predict` and `report`."""
    diagnose = add_verb(
        verbs, "diagnose", "attention and features of models, side by side: numbers and plots",
        "Attention distance, diversity of heads, average maps, share of the position bias, spectrum and CKA, over\n"
        "images of a source. MODEL is a run's folder, an exported one, teacher:RUN, or NAME@pretrained (@PATH,\n"
        "@none) of any ViT or Swin. Writes diagnosis.json, PNG, SVG and a page of all.",
        "  fd-scale diagnose runs/digits/distill teacher:runs/digits/distill\n"
        "  fd-scale diagnose vit_base_patch16_224.dino@pretrained --images imagefolder:photos --out diagnosis",
    )  # fmt: skip
    diagnose.add_argument(
        "models", metavar="MODEL", nargs="+", help="what to look at; CKA is with the first one"
    )
    diagnose.add_argument(
        "--images", metavar="SOURCE", help="imagefolder:PATH, tar:PATH, ... (default: those of the first run)"
    )
    diagnose.add_argument("--out", metavar="DIR", help="folder of the results (default: RUN/diagnosis)")
    diagnose.add_argument("--num-images", type=int, default=64, help="evenly spread ones (default: 64)")
    diagnose.add_argument("--batch-size", type=int, default=16, help="images at a time (default: 16)")
    diagnose.add_argument("--img-size", type=int, help="side in pixels (default: each model's own)")
    diagnose.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    diagnose.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    diagnose.set_defaults(run=_diagnose)

    landscape = add_verb(
        verbs, "landscape", "the loss around a run's trained weights, and its largest curvature",
        "Measures the loss (and accuracy) on a plane of two filter-normalised directions, or a line of one, and the\n"
        "Hessian's largest eigenvalue, into RUN/diagnosis; under torchrun ranks share the images. The same command\n"
        "goes on; another grid or checkpoint needs another --out.",
        "  fd-scale landscape runs/digits/finetune --points 21\n"
        "  fd-scale landscape runs/digits/finetune --directions 1 --points 51\n"
        "  fd-scale landscape runs/mine/checkpoints/step_00005000 data.evaluation=imagefolder:photos",
    )  # fmt: skip
    landscape.add_argument("run_dir", metavar="RUN", help="folder of a run, or one of its checkpoints")
    add_overrides(landscape)
    landscape.add_argument(
        "--directions", type=int, choices=(1, 2), default=2, help="a line or a plane (default: 2)"
    )
    landscape.add_argument("--out", metavar="DIR", help="folder of the results (default: RUN/diagnosis)")
    landscape.add_argument("--points", type=int, default=11, help="along each direction, odd (default: 11)")
    landscape.add_argument(
        "--span", type=float, default=1.0, help="to the edge, in weights' lengths (default: 1)"
    )
    landscape.add_argument("--seed", type=int, default=0, help="of the directions (default: 0)")
    landscape.add_argument("--num-images", type=int, default=256, help="evenly spread ones (default: 256)")
    landscape.set_defaults(run=_landscape)

    _add_predict(verbs)

    report = add_verb(
        verbs, "report", "one page of a run, or of several side by side: curves, pictures, settings",
        "Writes a self-contained HTML page and its numbers as JSON; several runs share their curves, and the table of\n"
        "settings shows where they differ.",
        "  fd-scale report runs/digits/distill\n"
        "  fd-scale report runs/a runs/b --out compared.html",
    )  # fmt: skip
    report.add_argument("run_dirs", metavar="RUN", nargs="+", help="folder of a run")
    report.add_argument(
        "--out", metavar="FILE", help="the page (default: report.html in the first run's folder)"
    )
    report.set_defaults(run=_report)


def _add_predict(verbs: Verbs) -> None:
    predict = add_verb(
        verbs, "predict", "what a model makes of images: pictures with classes or objects, or a table of classes",
        "Predicts an image, or all below a folder, as `evaluate` does, and writes OUT/NAME.png for each, of a\n"
        "detection OUT/detections.json, too (COCO's format, with scores), of a classification OUT/predictions.csv.",
        "  fd-scale predict runs/ade20k/tiny photo.jpg --out predicted\n"
        "  fd-scale predict runs/digits/finetune photos --out predicted\n"
        "  fd-scale predict runs/coco/tiny photos --out predicted detection.score_threshold=0.3\n"
        "  fd-scale predict runs/mine photos --out predicted segmentation.flip_too=true",
    )  # fmt: skip
    predict.add_argument("run_dir", metavar="RUN", help="folder of a run, or one of its checkpoints")
    predict.add_argument("images", metavar="IMAGE", help="an image file, or a folder")
    predict.add_argument("--out", metavar="DIR", required=True, help="folder of what is written")
    add_overrides(predict)
    predict.add_argument(
        "--masks",
        action="store_true",
        help="of a segmentation: grey PNG files, classes from 0 on, of ADE20K from 1, as its server takes them",
    )
    predict.set_defaults(run=_predict)


def _diagnose(options: argparse.Namespace) -> None:
    from fd_scale import log
    from fd_scale.diagnose.run import Options, diagnose, show

    names = ("images", "num_images", "batch_size", "device", "precision", "img_size")
    log.set_up()
    show(diagnose(options.models, options.out, Options(**{name: getattr(options, name) for name in names})))


def _landscape(options: argparse.Namespace) -> None:
    from fd_scale import api
    from fd_scale.diagnose.landscape import Grid

    grid = Grid(directions=options.directions, points=options.points, span=options.span, seed=options.seed)
    found = api.landscape(options.run_dir, grid, options.overrides, options.num_images, options.out)
    rows = found["rows"]
    middle = rows[len(rows) // 2][grid.points // 2]
    value, images = found["top_eigenvalue"], found["eigenvalue_images"]
    curved = "does not fit in memory"
    if value is not None:
        curved = f"{value:.5g}, to within {found['eigenvalue_error']:.2g}, over {images} images"
    of = f"loss {middle['loss']:.5g} (--num-images {found['of']['num_images']})"
    print(f"{of}; largest eigenvalue of the Hessian: {curved}")


def _predict(options: argparse.Namespace) -> None:
    from fd_scale import api

    written = api.predict(options.run_dir, options.images, options.out, options.overrides, options.masks)
    pictures = [file for file in written if file.suffix == ".png"]
    print(f"{len(pictures)} pictures in {options.out}" if pictures else written[0])


def _report(options: argparse.Namespace) -> None:
    from fd_scale.report.run import report

    print(report(options.run_dirs, options.out))
