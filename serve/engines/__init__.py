"""Engines that run the graph of a bundle: onnxruntime on a CPU or an NVIDIA GPU, and OpenVINO.

`base` has the protocol they share, `select` maps the setting `engine` to them. A worker process has
one engine.
"""
