"""Measurements as ratios, each to something named that takes turns with it (`moepp bench`).

* `experts`  what zero-computation experts save of the FFN experts' time, beside what they could
* `trained`  the same by the routing of a checkpoint
* `layer`    a whole layer beside its vanilla twin and what a user would pick instead
* `memory`   what memory these layers take
* `growth`   a layer's time per token with more tokens, and with more experts
* `step`     a whole update of a recipe beside its vanilla twin's
* `all2all`  what expert parallelism sends, and what it costs a layer
* `save`     how long a checkpoint stops training, beside a plain write of as many bytes, and what memory it takes

presets: sizes of the paper's models. routes: routing that is forced and balanced. cases, rivals: what takes turns.
on_ranks, traffic: several ranks, and what they send each other. profile: a trace of one update (`moepp profile`).
"""
