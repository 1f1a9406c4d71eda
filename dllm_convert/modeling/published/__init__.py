"""All that travels with a converted model: needs torch and transformers, nothing of ours.

Each module goes into one of the files that `bundle.py` writes, so none imports another inside
a function, or under another name.
"""
