"""The first quarter of an hour on a GPU, in three parts: what works there, how fast it is, and where the time goes.

Question: do the tests marked `gpu` pass, and how fast are the forwards, decoding and whole runs, beside their bound and
          beside what people use; what does the GPU wait for?
Command:  make gpu PART=1|2|3; with an interpreter that has the packages already, GPU_PYTHON=python3 besides
Method:   a part is a list of steps, the most wanted first; a step is a process with a time limit, and appends
          every figure to figures.jsonl the moment it has it. A part ends with a table, expected beside found.

    __main__   the command            parts     the steps of each part, and their limits
    runner     runs the steps         figures   figures.jsonl, the expected figures, the table
    day        what a step is given   the rest  the steps
"""
