"""Which backend each feature gets, and what a choice of backends cannot go with."""

from dataclasses import dataclass

from torch.optim import Optimizer

from dlrm.refusals import ConfigError
from embeddings import Dense, EmbeddingBags
from embeddings.backend import Backend


@dataclass
class Backends:
    """The choice of a configuration: a feature's own backend (`named`), else dense if it has fewer rows than
    dense_below, else the default."""

    default: Backend
    named: dict[str, Backend]
    dense_below: int

    def __post_init__(self):
        if isinstance(self.default, Dense):
            self.dense = self.default
        else:
            how = {name: getattr(self.default, name) for name in ("accumulate", "init", "precision")}
            self.dense = Dense(embedding_dim=self.default.embedding_dim, compression=1.0, **how)

    @property
    def by_key(self) -> dict[str, Backend]:
        """The backends that the configuration names, by the key that does."""
        return {"embedding": self.default} | {f"features.{name}": own for name, own in self.named.items()}

    def say_unused(self, compression: float) -> None:
        """A line for each backend that has a ratio of its own and does not compress. compression: the root's."""
        for key, own in self.by_key.items():
            usual = 1 if own is self.default else compression
            if not own.compresses and own.compression != usual:
                ratio = f"compression={own.compression:g}"
                print(f"{key}={own.name}: its rows are given, so {ratio} does not apply to it")

    def refuse_16_bits(self, why: str) -> None:
        """Raises ConfigError, naming the key, where a backend keeps weights in 16 bits."""
        for key, own in self.by_key.items():
            if own.precision != "fp32":
                raise ConfigError(f"{why} with {key}.precision={own.precision}; it needs fp32")

    def refuse_auto(self, optimizer: Optimizer) -> None:
        """Raises ConfigError, naming the key, where what accumulate=auto picks would change the optimizer's result."""
        if optimizer.moves_untouched:
            decay, kind = optimizer.param_groups[0]["weight_decay"], type(optimizer).__name__
            under = f"{kind} with weight_decay={decay}" if decay else kind
            for key, own in self.by_key.items():
                if own.accumulate == "auto":
                    raise ConfigError(
                        f"{key}.accumulate=auto: under {under} its pick changes the result (untouched slots move under "
                        f"a dense gradient only); use accumulate=rows or sorted"
                    )

    def stand_in(self, feature_names: list[str], **how) -> EmbeddingBags:
        """Embeddings of one row per feature, for the model's constructor to judge its own configuration by."""
        tiny = {feature: self.dense for feature in feature_names}
        return EmbeddingBags(tiny, dict.fromkeys(tiny, 1), **how)

    def take_any_id(self, feature_names: list[str]) -> set[str]:
        """The features that might get a backend without an upper limit of ids."""
        return {f for f in feature_names if not self.named.get(f, self.default).ranged}

    def choose(self, cardinalities: dict[str, int]) -> dict[str, Backend]:
        """Feature -> backend, in the order of cardinalities; says so if none gets the default."""
        usual = {f: self.dense if n < self.dense_below else self.default for f, n in cardinalities.items()}
        chosen = {f: self.named.get(f, usual[f]) for f in cardinalities}
        if self.default.compresses and self.default not in chosen.values():
            print(f"embedding={self.default.name}: no feature gets it, all others have fewer rows than dense_below")
        return chosen
