// Computes logits of a folder by transformers.js; the arguments are a JSON object, and so is what is printed.
import fs from "node:fs";
import * as transformers from "@huggingface/transformers";

const { AutoConfig, AutoModelForImageClassification, ImageClassificationPipeline, ImageProcessor, PreTrainedModel } =
  transformers;
const { env, LogLevel, RawImage, Tensor } = transformers;
const given = JSON.parse(process.argv[2]);
env.allowRemoteModels = false;
env.localModelPath = given.models;

const reason = async (promise) => promise.then(() => null).catch((error) => error.message);
const model = await PreTrainedModel.from_pretrained(given.name, { dtype: "fp32" });
const config = { ...(await AutoConfig.from_pretrained(given.name)), model_type: "resnet" };
const auto = await AutoModelForImageClassification.from_pretrained(given.name, { config, dtype: "fp32" });

const bytes = fs.readFileSync(given.pixels);
const data = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);
const pixel_values = new Tensor("float32", data, given.shape);
const logits = async (model) => (await model({ pixel_values })).logits.tolist();

const processor = await ImageProcessor.from_pretrained(given.name);
const classify = new ImageClassificationPipeline({ task: "image-classification", model, processor });
const image = await RawImage.read(given.image);

console.log(
  JSON.stringify({
    version: env.version,
    logits: await logits(model),
    auto: await logits(auto),
    pixels: (await processor(image)).pixel_values.tolist()[0],
    scores: await classify(image, { top_k: null }),
    without_config: await reason(AutoModelForImageClassification.from_pretrained(given.name)),
    pipeline: await reason(transformers.pipeline("image-classification", given.name, { config })),
  }),
);
