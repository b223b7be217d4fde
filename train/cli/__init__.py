"""The commands of `python -m train`; run.py spells out a training run."""
