"""Every field of a run with its default and meaning; recipes change a few of them.

Configs are locked: an unknown field fails with the nearest name. Durations end in `_steps`, `_epochs` or `_examples`.
A rule is a (regular expression, value) pair over parameter paths such as `blocks/mlp/up/kernel`; the first that matches
decides. A value is a number, or a tuple with one number a layer for the stacked `blocks`.
"""

from ml_collections import ConfigDict


def data() -> ConfigDict:
    """Where images come from, how they are read, and how many of them may be unusable."""
    c = ConfigDict()
    c.source = "digits"  # digits | shapes | photos | folder=PATH | tfds=NAME | array_record=GLOB | tar=GLOB | hf=PATH
    c.eval_source = ""  # the held-out images, same syntax; "": the source's own held-out split
    c.train_split = "train"  # as the source names it (TFDS also takes slices)
    c.eval_split = "validation"  # validation, val and valid mean the same, and fall back to test
    c.image_field = "image"  # where TFDS, ArrayRecord and Hugging Face records keep the image
    c.label_field = "label"  # where they keep the class; "": no classes
    c.text_field = ""  # where records keep the text; "": text or caption
    c.multi_label = False  # targets are sets of classes: loss.kind must be sigmoid
    c.channels = 3  # 1, 3 or N
    c.bits = 8  # 8, or 16 to keep 16-bit images whole
    c.background = (255, 255, 255)  # what shows through transparent pixels
    c.decode = "fast"  # fast: JPEG at 1/2, 1/4 or 1/8 when the target is at most half of that | full
    c.max_pixels = 100_000_000  # larger images are refused from their header
    c.max_bad_share = 0.01  # the run stops above this share of unusable images
    c.num_threads = -1  # decoding threads; -1: one a core, 16 at most
    c.num_workers = 0  # decoding processes; 0: threads only. The rows do not depend on either
    c.squash = False  # resize to a square grid: the baseline that native resolution is measured against
    return c


def packing() -> ConfigDict:
    """How images share rows: B rows of L tokens and K slots a step."""
    c = ConfigDict()
    c.row_length = 256  # L, tokens a row: as many as the largest image has, or more
    c.rows_per_step = 8  # B, over all devices
    c.images_per_row = 0  # K, slots a row; 0: twice the mean, from a dry run of the planner
    c.rows_per_group = 0  # G, rows of one capacity profile; a device wants whole groups; 0: about 12 longest images
    c.look_ahead = 512  # images that wait for the row that they fill best
    c.restore_dropped = True  # fill a closed row's gap with tokens that its images had dropped
    return c


def resolution() -> ConfigDict:
    """The size that each image is given in training, drawn anew each epoch; the image's aspect stays."""
    c = ConfigDict()
    c.distribution = "uniform"  # uniform | truncated_normal
    c.on = "side"  # side | area: what is drawn, for the square of equal area
    c.min_side = 64  # pixels
    c.max_side = 256  # pixels
    c.mean = -0.5  # truncated_normal, on [-1, 1] mapped to [min, max]
    c.std = 1.0  # truncated_normal, on [-1, 1]
    return c


def drop() -> ConfigDict:
    """How many of an image's tokens are left out in training. Evaluation drops none."""
    c = ConfigDict()
    c.kind = "beta"  # none | constant | beta | resolution (longer: more) | scheduled (over the run)
    c.rate = 0.5  # constant
    c.mean_rate = 0.4  # beta: d_mean, rates in [0, max_rate]
    c.max_rate = 0.9  # beta, and the longest sequence under 'resolution'
    c.min_rate = 0.1  # resolution and scheduled
    c.end_rate = 0.8  # scheduled: r_max of r_min + (r_max - r_min) * sigmoid((n - midpoint) / tau)
    c.midpoint_examples = 0.0  # scheduled: mu, images seen
    c.tau_examples = 1.0  # scheduled: tau; negative decreases
    return c


def augment() -> ConfigDict:
    """Changes of the pixels in training; the paper has none, small data needs some."""
    c = ConfigDict()
    c.flip = False  # left-right, half of the images
    c.crop_min_area = 1.0  # random crop keeps this share of the area or more; 1: no crop
    c.crop_max_aspect = 1.0  # the crop's aspect against the image's, up to this factor either way
    c.randaugment_ops = 0  # operations an image
    c.randaugment_magnitude = 10  # of 30
    c.erasing = 0.0  # share of images with a random rectangle of noise
    c.mixup = 0.0  # alpha of Beta(alpha, alpha): images of a row are blended with a neighbour of the row
    return c


def model() -> ConfigDict:
    """The image tower; the paper's model where nothing is said."""
    c = ConfigDict()
    c.variant = "B/16"  # Ti S B L So400m g, slash, patch size
    c.like = ""  # weights (a path or hub name) whose architecture decides the fields below; "": these fields do
    c.width, c.depth, c.heads, c.mlp_dim, c.patch_size = 0, 0, 0, 0, 0  # 0: the variant's
    c.head_size = 0  # 0: width / heads
    c.stored_patch_size = 0  # FlexiViT: the kernel is kept at this size and resampled to the variant's; 0: the same
    c.posemb = "learned"  # learned | sinusoidal | fourier | rope | table (the 16x16 grid of NaFlex) | none
    c.posemb_coords = "absolute"  # absolute | fractional | resized (learned: as an image is) | centred (rope)
    c.posemb_combine = "sum"  # sum | product | concat
    c.posemb_max = 64  # rows of the table: the largest side in patches when absolute
    c.posemb_beyond = "error"  # error | interpolate: what happens to grids with a side above posemb_max
    c.posemb_grid = (16, 16)  # rows and columns of the table
    c.posemb_resize = "bilinear"  # bilinear (antialiased), linear | bicubic, bicubic_antialias: of table and resized
    c.posemb_square = False  # resize for the square of the longer side, and cut
    c.rope_base = 10_000.0  # rope: pair i of n turns by coordinate * base ** (-i / n)
    c.rope_axes = "same"  # same | alternate: frequencies of y and x
    c.norm = "layer"  # layer | rms
    c.norm_eps = 1e-6  # added to the variance
    c.norm_tokens = True  # the last norm, before pooling
    c.norm_pooled = False  # a norm behind pooling
    c.embed_norm = "none"  # none | after, both (the embedded patch, and its pixels) | entry (what enters the blocks)
    c.mlp = "gelu_tanh"  # gelu_tanh | gelu | quick_gelu | swiglu
    c.layer_scale = 0.0  # first value of a learned factor of each branch; 0: none
    c.qk_norm = True  # queries and keys are normalised, as in ViT-22B
    c.qk_rms = False  # queries and keys by root mean square, with a scale for each head
    c.bias = False  # biases in dense layers and norms; the paper has none
    c.pool = "map"  # map (attention pooling) | mean | first (register: a class token) | query (vit-pytorch's)
    c.registers = 0  # extra tokens an image that belong to no patch
    c.window = 0  # patches a side of the windows that blocks attend within; 0: blocks see whole images
    c.full_blocks = ()  # numbers of the blocks that see whole images all the same, as (7, 15)
    c.merge = 0  # width of the tokens that 2x2 patches are merged into; 0: none. pool must be mean
    c.pre_logits = 0  # width of a tanh layer before the head; 0: none
    c.mean, c.std = (0.5,), (0.5,)  # of pixels in [0, 1], one number or one a channel
    c.dropout = 0.0  # share of the numbers of the embedding and of each branch that become 0 in training
    c.stochastic_depth = 0.0  # of the last layer, linear from 0
    c.remat = "light"  # none | light (norms and GELU) | dots | full: what the backward pass recomputes
    c.dtype = "auto"  # auto: bfloat16 on accelerators, float32 on a CPU
    c.attention = "auto"  # a backend's name, or the rule of navit_jax.attention
    return c


def text() -> ConfigDict:
    """Texts and their tower, of a contrastive run."""
    c = ConfigDict()
    c.tokenizer = "bytes"  # bytes | the path of a Hugging Face tokenizer.json or of a SentencePiece *.model
    c.max_tokens = 64  # longer texts are cut, and counted
    c.lower = True  # texts in lower case
    c.pad = -1  # id that fills every text up to max_tokens and is read like any other (SigLIP); -1: none
    c.row_length = 0  # T, text tokens a row; 0: what the texts of a step's images need, from a dry run
    c.texts_per_row = 0  # M, slots a row; 0: from a dry run
    c.width, c.depth, c.heads, c.mlp_dim = 0, 0, 0, 0  # 0: the image tower's
    c.vocab_size = 0  # rows of the token table; 0: the tokenizer's
    c.pool = "last"  # last (token) | map | mean
    return c


def contrastive() -> ConfigDict:
    """The common space of images and texts, and the loss on it."""
    c = ConfigDict()
    c.loss = "softmax"  # softmax (CLIP) | sigmoid (SigLIP)
    c.embed_dim = 512  # of the common space
    c.project_image = True  # False: the image tower's pooled vector as it is, embed_dim its width (SigLIP)
    c.project_bias = False  # of the projections
    c.init_scale = 10.0  # of the logits, 1 / temperature; learned
    c.max_scale = 100.0  # the learned scale stays below
    c.init_bias = -10.0  # sigmoid; learned
    c.block = 1024  # rows of each side in a block of logits: temporaries are block x block
    c.cache_parts = 1  # towers see the rows in this many parts, the loss all (gradient caching); each communicates
    return c


def optim() -> ConfigDict:
    """The optimizer, its schedule, and rules on what it does to which parameter."""
    c = ConfigDict()
    c.name = "adamw"  # adamw | adafactor
    c.lr = 8e-4  # the highest, before multipliers
    c.schedule = "rsqrt"  # rsqrt | cosine | linear | constant
    c.warmup_steps = 0  # linear from 0
    c.cooldown_steps = 0  # rsqrt and constant: linear to 0 at the end
    c.rsqrt_timescale_steps = 10_000  # rsqrt: lr / sqrt(1 + t / timescale)
    c.b1, c.b2, c.eps = 0.9, 0.999, 1e-8  # of Adam; b1 and the cap b2 of Adafactor
    c.weight_decay = (("^head/", 3.0), (".*kernel$", 0.03))  # rules; multiplied by the learning rate; no match: 0
    c.lr_multipliers = ()  # rules; no match: 1
    c.layer_decay = 1.0  # below 1: each layer learns by this factor slower than the one behind it (0.75); fine-tuning
    c.freeze = ()  # regular expressions of parameters that do not train
    c.clip_norm = 1.0  # of the global gradient; 0: off
    c.ema_decay = 0.0  # 0: no average is kept; evaluation uses it where there is one
    c.accumulate_steps = 0  # the step's rows in this many parts, each communicates; 0: 1, on one CPU by its cache
    return c


def mesh() -> ConfigDict:
    """Sizes of the mesh's axes; their product is the number of devices, -1 is what is left of it."""
    c = ConfigDict()
    c.data = -1  # rows are split, parameters are copied
    c.fsdp = 1  # rows are split, and parameters, moments and average too; gathered layer by layer
    c.tensor = 1  # heads and MLP are split; the same rows
    return c


def evaluation() -> ConfigDict:
    """What is measured on held-out images, and at how many tokens each."""
    c = ConfigDict()
    c.token_budgets = (64, 128, 256)  # each image is resized to at most this many tokens
    c.rows_per_step = 0  # 0: as in training
    c.max_examples = 0  # of the held-out images; 0: all
    c.prompts = ""  # zero-shot: file of templates, a line each, {} for the class; "": the embedded set's own, none: off
    c.fewshot_shots = ()  # images a class of the linear probe
    c.fewshot_ridge = 1024.0  # its L2 penalty
    return c


def get_config() -> ConfigDict:
    """Every field with its default."""
    c = ConfigDict()
    c.name = "navit"  # of the run's folder
    c.seed = 0  # of parameters, order, sizes, dropping and augmentation
    c.total_steps, c.total_examples, c.total_epochs = 0, 0, 0.0  # the first that is not 0 decides
    c.log_every_steps = 10  # lines of metrics.jsonl
    c.eval_every_steps = 0  # 0: at the end only
    c.checkpoint_every_steps = 1000  # 0: at the end only
    c.keep_checkpoints = 2  # the last ones, and the best besides
    c.best_metric = ""  # of metrics.jsonl, larger is better; "": eval/top1 (or map), retrieval/t2i_r1, or zeroshot/top1
    c.init_from = ""  # a run's folder or checkpoint to fine-tune from
    c.objective = "supervised"  # supervised (labels) | contrastive (texts)
    c.loss = ConfigDict(dict(kind="sigmoid", label_smoothing=0.0))  # sigmoid | softmax
    c.data, c.packing, c.resolution, c.drop, c.augment = data(), packing(), resolution(), drop(), augment()
    c.model, c.optim, c.mesh, c.eval = model(), optim(), mesh(), evaluation()
    c.text, c.contrastive = text(), contrastive()
    return c.lock()
