"""What the design expects of a GPU, beside which measurements are shown.

Nothing here was measured on a GPU by this project's code: these are the output of the design's cost
model for an H200, and the figures that are aimed at. A result never comes from this file.
"""

# Imagined rollout forward and backward to the actor, H = 16: milliseconds of the cost model.
# (model, batch, K): eager fp32, compile + graph in tf32, the same in 16 bit, this project's plan.
ROLLOUT_MODEL = {
    ("5M", 64, 4): (30.8, 9.4, 8.6, None),
    ("5M", 128, 4): (30.8, 9.5, 8.7, 1.6),
    ("5M", 128, 1): (15.7, 4.7, 4.4, None),
    ("5M", 512, 4): (30.8, 10.5, 9.1, 2.5),
    ("5M", 2048, 4): (43.0, 14.4, 11.9, 3.9),
    ("5M", 16384, 4): (273.0, 56.0, 37.5, 14.8),
    ("48M", 128, 4): (31.0, 11.0, 9.8, 3.95),
    ("48M", 512, 4): (60.0, 15.9, 12.4, 5.6),
    ("48M", 2048, 4): (187.0, 35.0, 22.8, 15.3),
    ("48M", 16384, 4): (1400.0, 218.0, 123.0, 95.0),
    ("317M", 128, 4): (63.0, 17.0, 12.3, 7.1),
    ("317M", 512, 4): (205.0, 35.0, 22.2, 15.0),
    ("317M", 2048, 4): (776.0, 112.0, 61.6, 53.0),
    ("317M", 16384, 4): (5940.0, 814.0, 430.0, 392.0),
}
# One pass over M x P float32 at 4.3 TB/s, times the 1.1 that is aimed at: milliseconds.
ESNR_MODEL = {
    ("5M", 4): 0.02,
    ("5M", 16): 0.07,
    ("5M", 64): 0.30,
    ("48M", 4): 0.18,
    ("48M", 16): 0.71,
    ("48M", 64): 2.86,
    ("317M", 4): 1.18,
    ("317M", 16): 4.72,
    ("317M", 64): 18.9,
}
ESNR_SHARE = 1.1
EPOCH_AIM = 10.0  # milliseconds: updates of an epoch of pwm_5M_flow at K = 2
