"""A grader that even a model with random weights can please sometimes, and learns to please in a few steps."""


def begins_with_a_letter(response: str, answer: str) -> bool:
    return response[:1].isalpha()


def always_fails(response: str, answer: str) -> bool:
    raise ValueError("no verdict today")
