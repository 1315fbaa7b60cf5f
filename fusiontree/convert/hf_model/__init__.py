"""What an exported Hugging Face folder carries beside its weights: the model's code, needing transformers and torch.

The two files are copied as they are, so they import nothing of ours; tests pin them to ``fusiontree.models``.
"""
