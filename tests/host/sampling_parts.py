"""Parts of the workflows that make videos: ComfyUI's own nodes for each family, with the numbers of its templates, and Apply LoRA."""

from __future__ import annotations

from dataclasses import dataclass

from downloads import Download, Models
from graph_builder import Wire
from graph_layout import Step

Sources = dict[str, Wire]
"""What later nodes are wired to, by name: model, model_low_noise, clip, vae, clip_vision, positive, negative, latent."""

FIRST_FRAME = "example.png"
"""An image that comes with ComfyUI; a user chooses another one."""
SEED = 1000
LTX_FPS = 25.0
WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
LTX_NEGATIVE = "worst quality, inconsistent motion, blurry, jittery, distorted"
PROMPT = "a kitten playing the piano"
LTX_PROMPT = "A kitten plays the piano in a sunlit living room. Its paws press the keys one after the other while the camera stays still."
"""This model wants it told at length."""


@dataclass(frozen=True)
class Size:
    """Of a video, in pixels and frames."""

    width: int
    height: int
    length: int


# Models and the LoRA


def load_models(step: Step, models: Models) -> Sources:
    """The loaders of ComfyUI."""
    sources = _load_transformers(step, models)
    names = [file["name"] for file in models.text_encoders]
    if len(names) == 1:
        clip = step.node("CLIPLoader", 106, clip_name=names[0], type=models.clip_type, models=models.text_encoders)
    else:
        chosen = {"clip_name1": names[0], "clip_name2": names[1]}
        clip = step.node("DualCLIPLoader", 130, type=models.clip_type, models=models.text_encoders, **chosen)
    sources["clip"] = clip, "CLIP"
    if models.vae:
        sources["vae"] = step.node("VAELoader", 58, vae_name=models.vae["name"], models=[models.vae]), "VAE"
    if models.clip_vision:
        looking = step.node("CLIPVisionLoader", 58, clip_name=models.clip_vision["name"], models=[models.clip_vision])
        sources["clip_vision"] = looking, "CLIP_VISION"
    return sources


def _load_transformers(step: Step, models: Models) -> Sources:
    if models.vae is None:
        (file,) = models.transformers
        checkpoint = step.node("CheckpointLoaderSimple", 98, ckpt_name=file["name"], models=[file])
        return {"model": (checkpoint, "MODEL"), "vae": (checkpoint, "VAE")}
    if len(models.transformers) == 1:
        return {"model": _load_transformer(step, models.transformers[0])}
    titles = {"model": "Load the high-noise model", "model_low_noise": "Load the low-noise model"}
    return {name: _load_transformer(step, file, title) for (name, title), file in zip(titles.items(), models.transformers, strict=True)}


def _load_transformer(step: Step, file: Download, title: str = "") -> Wire:
    return step.node("UNETLoader", 82, unet_name=file["name"], weight_dtype="default", title=title, models=[file]), "MODEL"


def apply_lora(step: Step, sources: Sources) -> Sources:
    models = {name: wire for name, wire in sources.items() if name.startswith("model")}
    lora = step.node("VideoTrainer_ApplyLoRA", 260, lora="none", wires=models)
    return {name: (lora, name) for name in models}


# First frames and prompts


def prompts(step: Step, sources: Sources, negative: str, words: str = PROMPT) -> Sources:
    clip = {"clip": sources["clip"]}
    positive = step.node("CLIPTextEncode", 120, text=words, title="Prompt", wires=clip)
    unwanted = step.node("CLIPTextEncode", 130, text=negative, title="Negative prompt", wires=clip)
    return {"positive": (positive, "CONDITIONING"), "negative": (unwanted, "CONDITIONING")}


def _image(step: Step) -> Wire:
    return step.node("LoadImage", 326, image=FIRST_FRAME, title="First frame"), "IMAGE"


def _looked_at(step: Step, sources: Sources, image: Wire) -> Wire:
    """What the image encoder sees: the whole image, squashed to a square."""
    wires = {"clip_vision": sources["clip_vision"], "image": image}
    return step.node("CLIPVisionEncode", 78, crop="none", wires=wires), "CLIP_VISION_OUTPUT"


def some(sources: Sources, *names: str) -> Sources:
    return {name: sources[name] for name in names}


def text_to_video(begin: Step, prompt: Step, sources: Sources, *, latent: str, size: Size, negative: str) -> Sources:
    noise = begin.node(latent, 130, **vars(size))
    return {**prompts(prompt, sources, negative), "latent": (noise, "LATENT")}


def wan_image(begin: Step, prompt: Step, sources: Sources, *, size: Size) -> Sources:
    """Wan 2.1 and 2.2 A14B: the first frame beside the noise; 2.1 also looks at it."""
    image = _image(begin)
    wires = {**prompts(prompt, sources, WAN_NEGATIVE), **some(sources, "vae"), "start_image": image}
    if "clip_vision" in sources:
        wires["clip_vision_output"] = _looked_at(begin, sources, image)
    node = prompt.node("WanImageToVideo", 210, **vars(size), wires=wires)
    return {name: (node, name) for name in ("positive", "negative", "latent")}


def wan22_5b(begin: Step, prompt: Step, sources: Sources, *, size: Size, first_frame: bool) -> Sources:
    wires = {**some(sources, "vae"), **({"start_image": _image(begin)} if first_frame else {})}
    sources = prompts(prompt, sources, WAN_NEGATIVE)
    latent = (prompt if first_frame else begin).node("Wan22ImageToVideoLatent", 150, **vars(size), wires=wires)
    return {**sources, "latent": (latent, "LATENT")}


def ltx(begin: Step, prompt: Step, sources: Sources, *, size: Size, first_frame: bool) -> Sources:
    vae = some(sources, "vae")
    image = _image(begin) if first_frame else None
    told = prompts(prompt, sources, LTX_NEGATIVE, LTX_PROMPT)
    if image:
        node = prompt.node("LTXVImgToVideo", 214, **vars(size), strength=1.0, wires={**told, **vae, "image": image})
        told = {name: (node, name) for name in ("positive", "negative", "latent")}
    else:
        told["latent"] = begin.node("EmptyLTXVLatentVideo", 130, **vars(size)), "LATENT"
    rated = prompt.node("LTXVConditioning", 78, frame_rate=LTX_FPS, wires=some(told, "positive", "negative"))
    return {**told, "positive": (rated, "positive"), "negative": (rated, "negative")}


def hunyuan_text(begin: Step, prompt: Step, sources: Sources, *, size: Size) -> Sources:
    text = prompt.node("CLIPTextEncode", 160, text=PROMPT, title="Prompt", wires=some(sources, "clip"))
    latent = begin.node("EmptyHunyuanLatentVideo", 130, **vars(size))
    return {"positive": _hunyuan_guided(prompt, (text, "CONDITIONING")), "latent": (latent, "LATENT")}


def hunyuan_image(begin: Step, prompt: Step, sources: Sources, *, size: Size) -> Sources:
    """I2V v2: the prompt is read with the image, and the first frame takes the place of the noise."""
    image = _image(begin)
    wires = {**some(sources, "clip"), "clip_vision_output": _looked_at(begin, sources, image)}
    text = prompt.node("TextEncodeHunyuanVideo_ImageToVideo", 180, prompt=PROMPT, image_interleave=4, title="Prompt", wires=wires)
    wires = {"positive": (text, "CONDITIONING"), **some(sources, "vae"), "start_image": image}
    node = prompt.node("HunyuanImageToVideo", 210, **vars(size), guidance_type="v2 (replace)", wires=wires)
    return {"positive": _hunyuan_guided(prompt, (node, "positive")), "latent": (node, "latent")}


def _hunyuan_guided(step: Step, positive: Wire) -> Wire:
    return step.node("FluxGuidance", 58, guidance=6.0, wires={"conditioning": positive}), "CONDITIONING"


# Sampling


def ksampler(
    step: Step, sources: Sources, *, steps: int, cfg: float, sampler_name: str, shift: float | None = None, title: str = ""
) -> Wire:
    """The images of a model under its noise shift; None: the one that ComfyUI gives it."""
    model = _shifted(step, sources["model"], shift) if shift else sources["model"]
    wires = {**some(sources, "positive", "negative"), "latent_image": sources["latent"], "model": model}
    numbers = {"steps": steps, "cfg": cfg, "sampler_name": sampler_name, "scheduler": "simple", "seed": SEED}
    sampled = step.node("KSampler", 262, title=title, wires=wires, **numbers)
    return decoded(step, sources, (sampled, "LATENT"))


def two_experts(step: Step, sources: Sources, *, steps: int, shift: float, switch: int) -> Wire:
    """Wan 2.2 A14B: the high-noise expert until step `switch`, then the low-noise one."""
    titles = {"model": "high noise", "model_low_noise": "low noise"}
    models = [_shifted(step, sources[name], shift, f"ModelSamplingSD3 ({said})") for name, said in titles.items()]
    latent = sources["latent"]
    for model, said, begin, end in zip(models, titles.values(), (0, switch), (switch, 10000), strict=True):
        first = begin == 0
        sampled = step.node(
            "KSamplerAdvanced",
            334,
            title=f"KSampler ({said})",
            add_noise="enable" if first else "disable",
            noise_seed=SEED if first else 0,
            steps=steps,
            cfg=3.5,
            sampler_name="euler",
            scheduler="simple",
            start_at_step=begin,
            end_at_step=end,
            return_with_leftover_noise="enable" if first else "disable",
            wires={**some(sources, "positive", "negative"), "latent_image": latent, "model": model},
        )
        latent = sampled, "LATENT"
    return decoded(step, sources, latent)


def switch_step(boundary: float, steps: int, shift: float) -> int:
    """The first step of the low-noise expert: the first whose noise level is below the boundary (scheduler simple, shifted)."""
    levels = [(steps - i) / steps for i in range(steps)]
    return next(i for i, level in enumerate(levels) if shift * level / (1 + (shift - 1) * level) < boundary)


def ltx_images(step: Step, sources: Sources) -> Wire:
    return decoded(step, sources, ltx_sampler(step, sources, some(sources, "latent")))


def ltx_sampler(step: Step, sources: Sources, sized: Sources) -> Wire:
    """Latents; `sized` is what the noise shift is read from, if anything."""
    sampler = step.node("KSamplerSelect", 58, sampler_name="euler"), "SAMPLER"
    numbers = {"steps": 30, "max_shift": 2.05, "base_shift": 0.95, "stretch": True, "terminal": 0.1}
    sigmas = step.node("LTXVScheduler", 154, wires=sized, **numbers), "SIGMAS"
    wires = {**some(sources, "model", "positive", "negative"), "sampler": sampler, "sigmas": sigmas, "latent_image": sources["latent"]}
    sampled = step.node("SamplerCustom", 230, add_noise=True, noise_seed=SEED, cfg=3.0, wires=wires)
    return sampled, "output"


def hunyuan_images(step: Step, sources: Sources) -> Wire:
    model = {"model": _shifted(step, sources["model"], 7.0)}
    guider = step.node("BasicGuider", 46, wires={**model, "conditioning": sources["positive"]}), "GUIDER"
    noise = step.node("RandomNoise", 82, noise_seed=SEED), "NOISE"
    sampler = step.node("KSamplerSelect", 58, sampler_name="euler"), "SAMPLER"
    sigmas = step.node("BasicScheduler", 106, scheduler="simple", steps=20, wires=model), "SIGMAS"
    wires = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent_image": sources["latent"]}
    sampled = step.node("SamplerCustomAdvanced", 106, wires=wires)
    tiles = {"tile_size": 256, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
    images = step.node("VAEDecodeTiled", 150, wires={"samples": (sampled, "output"), **some(sources, "vae")}, **tiles)
    return images, "IMAGE"


def _shifted(step: Step, model: Wire, shift: float, title: str = "") -> Wire:
    return step.node("ModelSamplingSD3", 58, shift=shift, title=title, wires={"model": model}), "MODEL"


def decoded(step: Step, sources: Sources, samples: Wire) -> Wire:
    return step.node("VAEDecode", 46, wires={"samples": samples, **some(sources, "vae")}), "IMAGE"


def save(step: Step, images: Wire, fps: float, name: str, title: str = "") -> None:
    """Images as a video file."""
    video = step.node("CreateVideo", 78, fps=fps, wires={"images": images})
    step.node("SaveVideo", 420, filename_prefix=f"video/{name}", title=title, wires={"video": (video, "VIDEO")})
