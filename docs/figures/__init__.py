"""The drawings of docs/concepts, made by the library's own quantizers.

`python -m docs.figures`, in the root of the repository, writes them to docs/assets/figures.
"""
