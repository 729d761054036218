"""Image operators applied before classification: a fixed list, implemented with DALI and with NumPy and torch.

    operators.py   the list: names, arguments, units, ranges, the five severities and their source
    seeds.py       the random bits of a sample: derived from its shard and key, never from its place in a batch
    tables.py      kernels, weights and maps that both implementations share, for a picture of one size
    graph.py       the operators as a DALI graph, for CPU and GPU
    dali.py        the pipeline that runs the graph
    plain.py       the same operators on one image, for the torchvision decoder
    conditions.py  the conditions of a run: names and recipes
    stage.py       the stage after the decoder: pixels in, pixels under every condition out

Operators change the resized image that the model sees, as in the Common Corruptions benchmark (D. Hendrycks and T.
Dietterich, ICLR 2019, arXiv:1903.12261; its pictures are first resized and cropped to 224 x 224). So a severity means
the same for photos of any size, an image is decoded and resized once for any number of conditions, and every operator
accepts an image of one pixel. Arguments in pixels are for a picture whose shorter side has 224 pixels, and scale with
the picture.
"""
