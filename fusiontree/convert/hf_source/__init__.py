"""Sources of ``hf_model/modeling_fusiontree.py``, the model file of exported Hugging Face folders.

``layers.py`` (mixers and block) and ``causal_lm.py`` (cache and transformers' classes) take their formulas from the
reference operations and model modules. ``assemble.py`` puts all of it into a file that needs only transformers and
torch.
"""
