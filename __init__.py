"""SemMAE: learn semantic parts on a frozen encoder, then pretrain a masked autoencoder on them.

The paper is "SemMAE: Semantic-Guided Masking for Learning Masked Autoencoders" (Li et al.,
NeurIPS 2022, arXiv 2206.10207); docstrings cite it as "paper, section ...".
"""

__version__ = "0.1.0"
