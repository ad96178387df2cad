"""One module per question, each with a frozen ``Config`` and ``main(config)`` that fills a run directory; here formula meets sampler."""
