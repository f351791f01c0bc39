"""Packaging. The patch records live at the top of the repository and install as `vllm_specbranch.patches`."""

from setuptools import setup

setup(
    packages=["vllm_specbranch", "vllm_specbranch.patches"],
    package_dir={"vllm_specbranch": "vllm_specbranch", "vllm_specbranch.patches": "patches"},
    package_data={
        "vllm_specbranch": [
            "py.typed",
            "demo_prompts.*",
            "models/README.md",
            "models/*/*.json",
            "models/*/*.safetensors",
        ],
    },
)
