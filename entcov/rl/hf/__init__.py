"""Actor, model and sampler on Hugging Face transformers, in one process."""
