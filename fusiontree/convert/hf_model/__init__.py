"""The model's code for exported Hugging Face folders; needs only transformers and torch.

Both files are copied unchanged; :mod:`fusiontree.convert.hf_assemble` renews the formulas in the model file.
"""
