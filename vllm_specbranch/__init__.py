"""Parallel speculative decoding for vLLM: the draft model drafts while the target model verifies.

SpecBranch (arXiv:2506.01979) and PEARL (arXiv:2408.11850) as a vLLM plugin. Importing this package imports neither torch nor
vLLM; see `plugin.register` for what happens when vLLM loads it.
"""

__version__ = "0.1.0"
