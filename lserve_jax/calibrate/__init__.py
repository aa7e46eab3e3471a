"""Which KV heads of a model need the whole context: trained gates, measured sensitivities.

    tokenizer = convert.load_tokenizer(directory)
    config, params = convert.load(directory)
    samples = PasskeySamples(tokenizer, text, PasskeySettings(max_length=4096))
    gates = train_gates(config, params, samples, GateTraining(steps=500))
    pandas.DataFrame(gates.table())

    measurement = Measurement(context=4096)
    sequences = measured_sequences(tokenizer, text, PasskeySettings(), measurement)
    sensitivity = measure_heads(config, params, measurement, sequences)
    shares = fit_shares(sensitivity, 0.125)

``convert.save_pattern`` and ``convert.save_head_shares`` write them where ``SparsityConfig`` reads
them. The command line, which also continues a stopped run: ``python -m lserve_jax.calibrate``.
"""

from lserve_jax.lazy import lazy_names

_MODULES = {
    "GateTraining": "lserve_jax.calibrate.gates",
    "HeadGates": "lserve_jax.calibrate.gates",
    "HeadSensitivity": "lserve_jax.model.head_shares",
    "Measurement": "lserve_jax.calibrate.sensitivity",
    "PasskeySamples": "lserve_jax.calibrate.passkeys",
    "PasskeySettings": "lserve_jax.calibrate.passkeys",
    "Sample": "lserve_jax.calibrate.gates",
    "builtin_text": "lserve_jax.calibrate.passkeys",
    "fit_shares": "lserve_jax.model.head_shares",
    "measure_heads": "lserve_jax.calibrate.sensitivity",
    "measured_sequences": "lserve_jax.calibrate.windows",
    "plot_gates": "lserve_jax.calibrate.pictures",
    "plot_head_shares": "lserve_jax.calibrate.pictures",
    "train_gates": "lserve_jax.calibrate.gates",
}

__getattr__ = lazy_names(__name__, _MODULES)
