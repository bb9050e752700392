"""The certificate: run a scorer against the rules that its score must keep, and report which it
kept.

    fairway certify mine:Scorer --val 'data/*_val_*.bin' --tokenizer tokenizer.model

A scorer has two methods. `score(tokens) -> float64[n-1]` returns the log-probability in nats of
tokens[1:], in order. `distribution(tokens, i) -> float64[V]` returns the probabilities that it held
for position i before it saw tokens[i]. A scorer may also offer

- `vocab_size`; - `tolerance` of its log-probabilities, if batching changes their rounding: 1e-4 at
most; - `boundaries(tokens)`: the target rows at which its windows, chunks, documents, batches and
ranks begin, by kind; - `commits`: the log of its last score(); - `embeddings(tokens) -> float[n,
D]`: its token embeddings after the smear gate.

A rule about something that the scorer does not offer ends in "cannot tell". Row j belongs to the
target tokens[j+1]. docs/LEGALITY.md has the ruling behind each rule, and what no run can see.
"""
