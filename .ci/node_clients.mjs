// What check_node.py has Node's clients do: `node node_clients.mjs '[["NAME", {"model": "opus"}]]'`
// does all these tasks at once and prints what they came to, a JSON list. An error of theirs is an
// outcome as well: {"error": {...}}.

import { createRequire } from 'node:module'

const require = createRequire(process.env.NODE_MODULES + '/')
const ai = require('ai')
const { generateText, generateObject, streamText, streamObject, isStepCount } = ai
const { createOpenAI } = require('@ai-sdk/openai')
const { createOpenAICompatible } = require('@ai-sdk/openai-compatible')
const { createAnthropic } = require('@ai-sdk/anthropic')
const { OpenAI } = require('openai')
const { z } = require('zod')

const shim = process.env.SHIM_URL
const options = { baseURL: shim + '/v1', apiKey: 'anything' }
const openai = createOpenAI(options)
const providers = {
  responses: openai.responses,
  chat: openai.chat,
  compatible: createOpenAICompatible({ name: 'shim', ...options, includeUsage: true }),
  anthropic: createAnthropic(options),
}
const client = new OpenAI({ ...options, maxRetries: 0, timeout: 10_000 })

const zone = z.object({ zone: z.string() })
const city = z.object({ city: z.string() })
const person = z.object({
  name: z.string().min(2),
  age: z.number().int().min(1),
  nick: z.string().nullable(),
})

// zod's schemas go out as draft-07, which Anthropic's documentation does not allow, nor the fake
// upstream; the shim mends it where it translates, and may not where it relays.
const schema = (api, shape) => (api === 'anthropic' ? ai.jsonSchema(z.toJSONSchema(shape)) : shape)

const tools = {
  get_weather: (api) => ai.tool({
    description: 'weather',
    inputSchema: schema(api, city),
    execute: ({ city }) => `sunny in ${[...city].length}`,
  }),
  get_time: (api) => ai.tool({ inputSchema: schema(api, zone), execute: () => 'noon' }),
  web_search: () => openai.tools.webSearch(),
  run_code: () => openai.tools.customTool({
    name: 'run_code',
    description: 'runs code',
    format: { type: 'grammar', syntax: 'lark', definition: 'start: /.+/' },
    execute: (text) => `ran ${text.length}`,
  }),
}

function settings({ api, model = 'claude-sonnet-5-5', messages, prompt, provider, use = [] }) {
  const chosen = Object.fromEntries(use.map((name) => [name, tools[name](api)]))
  return {
    model: providers[api](model),
    ...(messages ? { messages } : { prompt }),
    ...(use.length ? { tools: chosen, stopWhen: isStepCount(6) } : {}),
    ...(provider ? { providerOptions: { openai: provider, anthropic: provider } } : {}),
    maxRetries: 0,
  }
}

function outcome(text, reasoning, finishReason, usage, steps, sources, messages, kinds) {
  const calls = steps.flatMap((step) => step.toolCalls.map((call) => call.toolName))
  const results = steps.flatMap((step) => step.toolResults.map((result) => result.output))
  const urls = sources.map((source) => source.url)
  return { text, reasoning, finishReason, usage, calls, results, urls, messages, kinds }
}

const tasks = {
  async generate(given) {
    const done = await generateText(settings(given))
    const first = done.steps[0]
    return outcome(
      done.text, first.reasoningText, done.finishReason, done.usage, done.steps, done.sources,
      done.responseMessages ?? done.response.messages,
    )
  },

  async stream(given) {
    const running = streamText({ ...settings(given), onError() {} })
    const kinds = []
    for await (const part of running.stream) {
      if (part.type === 'error') throw part.error
      if (part.type !== kinds.at(-1)) kinds.push(part.type)
    }
    const steps = await running.steps
    return outcome(
      await running.text, steps[0].reasoningText, await running.finishReason, await running.usage,
      steps, await running.sources, (await running.response).messages, kinds,
    )
  },

  async object(given) {
    return { object: (await generateObject({ ...settings(given), schema: schema(given.api, person) })).object }
  },

  async objectStream(given) {
    const running = streamObject({ ...settings(given), schema: schema(given.api, person), onError() {} })
    let partials = 0
    for await (const _ of running.partialObjectStream) partials += 1
    return { object: await running.object, partials }
  },

  // The openai package itself: its stream helper checks the order of the events.
  async helper({ body }) {
    const events = client.responses.stream({ model: 'sonnet', ...body })
    const kinds = []
    for await (const event of events) kinds.push(event.type)
    return { kinds, response: await events.finalResponse() }
  },

  async chatHelper({ body }) {
    const events = client.chat.completions.stream({ model: 'sonnet', ...body })
    for await (const _ of events);
    return { completion: await events.finalChatCompletion() }
  },

  async create({ body }) {
    return { response: await client.responses.create({ model: 'sonnet', ...body }) }
  },
}

async function did([name, given]) {
  try {
    return await tasks[name](given)
  } catch (error) {
    const { name, message, status, statusCode, code } = error
    return { error: { name, message, status: status ?? statusCode, code } }
  }
}

console.log(JSON.stringify(await Promise.all(JSON.parse(process.argv[2]).map(did))))
