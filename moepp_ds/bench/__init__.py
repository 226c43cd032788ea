"""Measurements that the project's promises rest on, for anyone to repeat on their own machines.

* `experts`  what zero-computation experts save of the FFN experts' time, beside what they could (`moepp bench experts`)
* `save`     how long a checkpoint stops training, beside a plain write of as many bytes, and what memory it takes

presets: sizes of the paper's models. routes: routing that is forced and balanced.
"""
