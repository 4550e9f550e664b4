"""What each figure means, in one sentence, with its source."""

# Below this sum of |weights| a row is dead; at it, the 1e-8 that Gu et al. add to a row's sum
# before they normalise changes the row by one percent.
DEAD_ROW = 1e-6
DEAD_OUTPUT = 1e-6
DEAD_SHARE = 0.95
MASSIVE_SIZE = 100.0
MASSIVE_RATIO = 1000.0

ATTENTION_DEFINITIONS = {
    "sink_rate": (
        "Share of sequences in which the raw weight on token 0, averaged over the queries that "
        "see it, exceeds the threshold (Gu et al., 2024, arXiv:2410.10781, with rows as they are, "
        "as in Zuhri et al., 2025, arXiv:2504.20966); it falls with the length, so compare it at "
        "one length only."
    ),
    "sink_rate_without_query_0": (
        "As sink_rate, without the queries that see token 0 alone (query 0 of a causal model), "
        "whose weight on it is no choice and, for rows that sum to anything, has no bound."
    ),
    "sink_rate_proportional": (
        "As sink_rate, with each row divided by its sum of |weights| first (Gu et al., 2024, "
        "arXiv:2410.10781); dead rows are left out, and a sequence that has no others has no sink."
    ),
    "sink_share": (
        "Sum of the |weights| on token 0 over the sum of all |weights|, over all queries that see "
        "token 0 and another key: rows count by the weight they carry."
    ),
    "sink_weight": (
        "The number that sink_rate compares with its threshold, averaged over sequences: the "
        "mean raw weight on token 0 of the queries that see it."
    ),
    "row_mass": "Mean sum of the weights of a row, with their signs: 1 for softmax.",
    "dead_rows": f"Share of rows whose |weights| sum to less than {DEAD_ROW:g}.",
    "entropy": (
        "Mean over the rows that are not dead of -sum p log p in nats, p being the |weights| of "
        "the row divided by their sum (Zhai et al., 2023, arXiv:2303.06296)."
    ),
    "sparsity": (
        "Share of exact zeros among the weights of visible keys (Zuhri et al., 2025, "
        "arXiv:2504.20966); weights that underflow count."
    ),
    "dead_tokens": (
        f"Share of tokens at which every component of the head's output is below {DEAD_OUTPUT:g} "
        "in size."
    ),
    "dead_head": (
        f"1 if dead_tokens is at least {DEAD_SHARE:g}, else 0 (Zuhri et al., 2025, "
        "arXiv:2504.20966)."
    ),
}

ACTIVATION_DEFINITIONS = {
    "kurtosis": (
        "Fourth central moment over (s^4 + 1e-6), s being the unbiased standard deviation, of all "
        "numbers of a sequence's hidden state, averaged over sequences (Bondarenko et al., 2023, "
        "arXiv:2306.12929), 3 for a normal distribution; for a model, the mean over its hidden "
        "states."
    ),
    "kurtosis_pooled": (
        "Pearson's kurtosis, fourth central moment over squared variance, of all sequences "
        "together; for a model, of all its hidden states too (Zuhri et al., 2025, "
        "arXiv:2504.20966)."
    ),
    "max_abs": (
        "Largest size of an activation of a sequence, averaged over sequences (Bondarenko et al., "
        "2023, arXiv:2306.12929); for a model, that of the hidden state with the largest."
    ),
    "largest": "Largest size of any activation.",
    "massive": (
        f"Number of activations larger than {MASSIVE_SIZE:g} and at least {MASSIVE_RATIO:g} times "
        "the median size of the sequence's hidden state, averaged over sequences (Sun et al., "
        "2024, arXiv:2402.17762); for a model, that of the hidden state with the most."
    ),
    "first_token_ratio": (
        "Norm of token 0's hidden state over the largest norm of another token's, averaged over "
        "sequences (residual-state peak, Guo et al., 2024, arXiv:2410.13835); for a model, that "
        "of the hidden state with the largest."
    ),
}

MODEL_DEFINITIONS = {
    "dead_heads": "Number of heads whose dead_head is 1.",
    "loss": "Mean cross-entropy of the next token in nats, for models that generate text.",
}

DEFINITIONS: dict[str, str] = {
    **ATTENTION_DEFINITIONS,
    **ACTIVATION_DEFINITIONS,
    **MODEL_DEFINITIONS,
}
