"""The model's code for exported Hugging Face folders; needs only transformers and torch.

The two files are copied unchanged, so they import nothing from fusiontree; tests compare them with
``fusiontree.models``.
"""
