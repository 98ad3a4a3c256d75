"""Tar files of images: their index, and the layout of WebDataset."""
