"""Patch records, one file per vLLM module touched. Installed as `vllm_specbranch.patches`; the list is in patches/README.md."""
