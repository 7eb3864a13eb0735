"""Data that comes with packages: OpenMoji pictures, easy-VQA, and scenes composed of pictures."""
