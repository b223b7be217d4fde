"""The job: labelled images in, a bundle out."""
import models.networks  # noqa: F401  (first: it declares what torchvision, and so lightning, needs beside a CPU torch)
