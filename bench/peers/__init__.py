"""What our ops are measured against: the formulas as PyTorch code would write them. One op family a file.

Every peer names its source; none is copied code.
"""
