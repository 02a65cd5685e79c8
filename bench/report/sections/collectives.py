"""placeholder"""


def section(evidence):
    return None
