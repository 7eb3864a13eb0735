"""Data that PyPI packages carry: OpenMoji pictures, easy-VQA, and scenes composed of OpenMoji pictures."""
