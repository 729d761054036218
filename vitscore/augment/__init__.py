"""What can be done to an image before it is classified: a closed list of operators, run by DALI or by NumPy and torch.

    operators.py   the list: names, arguments, units, ranges, the five severities, where their numbers come from
    seeds.py       the random bits of a sample: from its shard and its key, never from its place in a batch
    tables.py      what both implementations share: kernels, weights, maps, for a picture of one size
    graph.py       the operators as a DALI graph, for CPU and GPU
    plain.py       the same operators on one image, for the torchvision decoder
    conditions.py  a run's conditions: names and recipes
    stage.py       the stage behind the decoder: pixels in, pixels under every condition out

Operators work on the resized image, the one that the model sees, as the Common Corruptions benchmark does (D. Hendrycks
and T. Dietterich, ICLR 2019, arXiv:1903.12261; its pictures are resized and cropped to 224 x 224 first). So a severity
means the same for a photo of any size, an image is decoded and resized once for any number of conditions, and an image
of one pixel survives every operator. Numbers of pixels are for a picture whose shorter side has 224, and grow and
shrink with it.
"""
