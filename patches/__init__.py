"""Patch records, one file per vLLM module touched. Installed as `vllm_specbranch.patches`; README.md lists them."""
