"""BibTeX of the papers behind the penalties and behind many views; methods carry their own."""

from __future__ import annotations

HE_2024 = """@inproceedings{he2024preventing,
  title = {Preventing Dimensional Collapse in Self-Supervised Learning via Orthogonality Regularization},
  author = {He, Junlin and Du, Jinxiao and Ma, Wei},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024}
}"""

BANSAL_2018 = """@inproceedings{bansal2018gain,
  title = {Can We Gain More from Orthogonality Regularizations in Training Deep Networks?},
  author = {Bansal, Nitin and Chen, Xiaohan and Wang, Zhangyang},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2018}
}"""

GHOSH_2024 = """@inproceedings{ghosh2024harnessing,
  title = {Harnessing small projectors and multiple views for efficient vision pretraining},
  author = {Ghosh, Arna and Agrawal, Kumar Krishna and Sodhani, Shagun and Oberman, Adam and Richards, Blake},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024}
}"""
