"""Packaging of fedsim; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"

setup(
    name="fedsim-a2v",
    version="0.1.0",
    description="Simulator for federated learning of audio-to-visual adapters on Ray",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["fedsim", "fedsim.*"]),
    package_data={"fedsim": ["py.typed"], "fedsim.config": ["*.yaml"]},
    install_requires=[
        "filelock>=3.12",
        "huggingface_hub>=0.30",
        "matplotlib>=3.8",
        "mlflow>=3.10,<4",
        "numpy>=1.26",
        "psutil>=5.9",
        "pydantic>=2.7,<3",
        "pyyaml>=6",
        "ray[default,tune]>=2.55,<3",
        "rich>=13",
        "safetensors>=0.5",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "soundfile>=0.12",
        "torch>=2.4",
        "transformers>=5,<6",
        "typer>=0.12",
    ],
    extras_require={
        "dev": [
            "hypothesis>=6.100",
            "kubernetes-validate>=1.31",
            "mypy>=1.10",
            "pre-commit>=3.7",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.5",
            "types-PyYAML>=6",
        ],
        "images": ["accelerate>=1", "diffusers>=0.35"],
        "privacy": ["opacus>=1.5"],
        "search": ["optuna>=4"],
    },
    entry_points={"console_scripts": ["fedsim = fedsim.cli:main"]},
)
