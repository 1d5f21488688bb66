"""Hugging Face models under the tie policy: what their configs and classes declare becomes claims."""
