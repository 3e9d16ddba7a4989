// Answers questions with transformers.js in Node, from an exported folder:
//   node web/answer.mjs EXPORTED_FOLDER QUESTIONS.json ANSWERS.json KIND MAX_NEW_TOKENS
// Both files are lists: {image, question} with the name of a picture beside the file, and {tokens, text, seconds}.
import { readFile, writeFile } from "node:fs/promises";
import { basename, dirname, join, resolve } from "node:path";
import { AutoModelForImageTextToText, AutoProcessor, env, RawImage } from "@huggingface/transformers";

const [folder, questionsFile, answersFile, kind, maxNewTokens] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(folder));
const name = basename(resolve(folder));

const processor = await AutoProcessor.from_pretrained(name);
const model = await AutoModelForImageTextToText.from_pretrained(name, {
  dtype: kind,
  device: "cpu",
  session_options: { intraOpNumThreads: 1, interOpNumThreads: 1 },
});
const answers = [];
for (const { image, question } of JSON.parse(await readFile(questionsFile, "utf8"))) {
  const messages = [{ role: "user", content: [{ type: "image" }, { type: "text", text: question }] }];
  const text = processor.apply_chat_template(messages, { add_generation_prompt: true });
  const picture = await RawImage.read(join(dirname(questionsFile), image));
  const inputs = await processor(text, [picture]);
  const begin = process.cpuUsage();
  const output = await model.generate({ ...inputs, max_new_tokens: Number(maxNewTokens), do_sample: false });
  const spent = process.cpuUsage(begin);
  const seconds = (spent.user + spent.system) / 1e6;
  const tokens = output.tolist()[0].slice(inputs.input_ids.dims[1]).map(Number);
  answers.push({ tokens, text: processor.tokenizer.decode(tokens, { skip_special_tokens: true }), seconds });
}
await writeFile(answersFile, JSON.stringify(answers));
