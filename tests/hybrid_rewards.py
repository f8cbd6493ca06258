"""Rewards of the tests of hybrid jobs; imported by the processes that compute rewards."""


def many_digits(prompt: str, completion: str, example: dict) -> float:
    """Share of the completion's bytes below 128: something that a random model does now and then."""
    return sum(byte < 128 for byte in completion.encode()) / 8


def a_tenth(prompt: str, completion: str, example: dict) -> float:
    """The same for every sample, and not what the mean of several gives back."""
    return 0.1
