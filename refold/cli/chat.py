"""`refold chat`: a conversation in the terminal."""

import os

from refold.cli import options, serve_options


def command(
    partner: serve_options.Partner = "http://127.0.0.1:8000",
    name: serve_options.ChatName = None,
    system: serve_options.System = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = 0.7,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
    api_key_file: serve_options.ChatKeyFile = None,
    weights: options.EngineWeights = "auto",
    device: options.Device = None,
) -> None:
    """Talk to a running server, or to a model that is opened here."""
    from refold.serve.dialogue import Dialogue, converse
    from refold.serve.settings import read_keys
    from refold.serve.speakers import LocalSpeaker, RemoteSpeaker, Speaker, SpeakSettings

    speaker: Speaker
    if partner.startswith(("http://", "https://")):
        key = os.environ.get("REFOLD_API_KEY") if api_key_file is None else read_keys(api_key_file)[0]
        speaker = RemoteSpeaker(partner, key, name)
    else:
        from refold.engine.engine import Engine
        from refold.engine.settings import EngineSettings
        from refold.serve.labels import default_name

        engine = Engine(partner, EngineSettings(weights=weights, max_rows=1), device=device)
        speaker = LocalSpeaker(engine, name or default_name("name", partner))
    settings = SpeakSettings(max_new_tokens or SpeakSettings.max_new_tokens, temperature, top_p, seed)
    converse(Dialogue(speaker, settings, system), speaker)
