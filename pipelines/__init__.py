"""Drop-in diffusers pipelines, one per model family."""

if __name__ == "pipelines":  # pragma: no cover
    raise ImportError("import core2_sampler.pipelines, not the folder by its bare name")
