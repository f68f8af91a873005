"""Package lt_det. Detectron2 itself is not on PyPI under its own name, so it is not among the requirements here:
install it from source, or as the Makefile does from the wheel that requirements-detectron2.txt pins."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "lt_det/__init__.py").read_text()).group(1)

setup(
    name="lt_det",
    version=VERSION,
    description="Long-tailed instance segmentation on LVIS, as a Detectron2 extension",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # The recipes live at the top of the checkout, and in lt_det.model_zoo of an installed package.
    packages=[*find_packages(include=["lt_det", "lt_det.*"]), "lt_det.model_zoo.configs"],
    package_dir={"lt_det.model_zoo.configs": "configs"},
    package_data={
        "": ["*.pyi"],  # what a package imports on first use is stated there
        "lt_det.report": ["templates/*"],
        "lt_det.model_zoo.configs": ["**/*.yaml", "**/*.py"],
    },
    entry_points={"console_scripts": ["lt-det=lt_det.cli:main"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.1",
        "torchvision>=0.16",
        "numpy>=1.24",
        "fvcore>=0.1.5.post20221221",
        "iopath>=0.1.9",
        "pycocotools>=2.0.6",
        "matplotlib>=3.6",
        "numba>=0.59",
        "orjson>=3.8",
        "msgspec>=0.18",
        "filelock>=3.12",
        "lazy-loader>=0.4",
        "tabulate>=0.9",
        "tqdm>=4.64",
        # The HTML pages of lt_det.report; Plotly carries the script that is written into them.
        "Jinja2>=3.0",
        "plotly>=5.9",
        # What Detectron2 imports, for environments where it was installed without its requirements.
        "cloudpickle",
        "hydra-core>=1.1",
        "omegaconf>=2.1,<2.4",
        "packaging",
        "setuptools<82",  # Detectron2's model_zoo imports pkg_resources
        "Pillow>=9.2",
        "termcolor>=1.1",
        "tensorboard",
        "yacs>=0.1.8",
    ],
    extras_require={
        # cv2: rendering glyph_lvis and boundary AP. Not above: it must not be put over an opencv-python that is there.
        "opencv": ["opencv-python-headless>=4.6"],
        # lvis without its requirements: it asks for the OpenCV that needs a display.
        "test": ["pytest>=7", "pytest-timeout", "pytest-xdist>=3", "hypothesis>=6.80", "scipy>=1.10"],
        "benchmark": ["hotcoco>=1.3"],
        # t-SNE of tools/plot_features.py.
        "features": ["scikit-learn>=1.2"],
        # What Detectron2's ViT, and its cropping of polygon masks, import.
        "vitdet": ["timm", "shapely"],
        # Export to ONNX, and running what was exported.
        "export": ["onnx>=1.16", "onnxruntime>=1.18"],
        # make docs.
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"],
        # What checks the code, and builds it: .ci/run, make lint.
        "dev": ["build", "mypy>=1.10", "ruff>=0.6"],
    },
)
