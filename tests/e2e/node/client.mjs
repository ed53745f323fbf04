// A client of voidbox that shares no code with it: the .proto files are all it knows.
//
//   node client.mjs PROTOS ADDRESS [TOKEN_FILE]
//
// Lists the services by reflection, makes a box, feeds a program in it, writes and reads a
// file, asks for what is not there, deletes the box, and prints what it saw as one JSON object.

import { createHash, randomBytes } from "node:crypto";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";

import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const OPTIONS = { keepCase: true, longs: Number, enums: String, defaults: true, oneofs: true };
const CHUNK = 64 * 1024;
const CALL_MILLISECONDS = 30_000;
// A cold boot under emulation takes seconds; on a busy machine, many.
const BOOT_MILLISECONDS = 240_000;
const PROGRAM_MILLISECONDS = 120_000;

// What `grpc.loadPackageDefinition` makes of one file, with `roots` to resolve its imports.
function load(file, ...roots) {
  return grpc.loadPackageDefinition(loadSync(file, { ...OPTIONS, includeDirs: roots }));
}

class Client {
  constructor(protos, address, token) {
    this.target = address.replace(/^tcp:\/\//, "");
    this.token = token;
    const own = (name) => load(`voidbox/${name}/v1/${name}.proto`, protos).voidbox[name].v1;
    this.hypervisor = this.#stub(own("hypervisor").HypervisorService);
    this.imager = this.#stub(own("imager").ImagerService);
    this.guest = this.#stub(own("guest").GuestService);
    const modules = dirname(createRequire(import.meta.url).resolve("@grpc/reflection/package.json"));
    const file = join(modules, "build/proto/grpc/reflection/v1alpha/reflection.proto");
    this.reflection = this.#stub(load(file).grpc.reflection.v1alpha.ServerReflection);
  }

  #stub(Service) {
    return new Service(this.target, grpc.credentials.createInsecure());
  }

  #metadata(box) {
    const metadata = new grpc.Metadata();
    if (this.token) metadata.set("authorization", `Bearer ${this.token}`);
    if (box) metadata.set("voidbox-box-id", box);
    return metadata;
  }

  // One request, one response.
  unary(stub, method, request, { box, milliseconds = CALL_MILLISECONDS } = {}) {
    const options = { deadline: Date.now() + milliseconds };
    return new Promise((resolve, reject) => {
      stub[method](request, this.#metadata(box), options, (error, response) =>
        error ? reject(error) : resolve(response),
      );
    });
  }

  // The full names of the services that the server has.
  async services() {
    const call = this.reflection.ServerReflectionInfo(this.#metadata(), { deadline: Date.now() + CALL_MILLISECONDS });
    call.write({ list_services: "" });
    call.end();
    const names = [];
    for await (const response of call) {
      for (const service of response.list_services_response.service) names.push(service.name);
    }
    return names;
  }

  // Run a program to its end; `stdin` is sent no faster than the guest takes it.
  async exec(box, start, stdin) {
    const call = this.guest.Exec(this.#metadata(box), { deadline: Date.now() + PROGRAM_MILLISECONDS });
    call.write({ start: { ...start, stdin: stdin !== undefined } });
    const output = { STD_STREAM_STDOUT: [], STD_STREAM_STDERR: [] };
    let sent = 0;
    let ended = stdin === undefined;
    let window = 0;
    let exit;
    const feed = async (taken) => {
      while (!ended && sent - taken < window) {
        const end = Math.min(stdin.length, sent + CHUNK, taken + window);
        const eof = end === stdin.length;
        const chunk = { data: stdin.subarray(sent, end), offset: sent, eof };
        sent = end;
        ended = eof;
        if (!call.write({ input: { stdin: chunk } })) await once(call, "drain");
      }
      if (ended) call.end();
    };
    for await (const { event } of call) {
      if (event.event === "stdin_offset") await feed(event.stdin_offset);
      else if (event.started) {
        window = event.started.stdin_window_bytes;
        await feed(event.started.stdin_offset);
      } else if (event.output) output[event.output.stream].push(event.output.data);
      else if (event.exit) exit = event.exit;
    }
    return {
      exit,
      stdout: Buffer.concat(output.STD_STREAM_STDOUT),
      stderr: Buffer.concat(output.STD_STREAM_STDERR),
    };
  }

  async writeFile(box, path, content) {
    return new Promise((resolve, reject) => {
      const options = { deadline: Date.now() + CALL_MILLISECONDS };
      const call = this.guest.WriteFile(this.#metadata(box), options, (error, response) =>
        error ? reject(error) : resolve(response),
      );
      call.write({ header: { path } });
      for (let at = 0; at < content.length; at += CHUNK) call.write({ data: content.subarray(at, at + CHUNK) });
      call.end();
    });
  }

  async readFile(box, path) {
    const call = this.guest.ReadFile({ path }, this.#metadata(box), { deadline: Date.now() + CALL_MILLISECONDS });
    const chunks = [];
    for await (const { data } of call) chunks.push(data);
    return Buffer.concat(chunks);
  }

  close() {
    for (const stub of [this.hypervisor, this.imager, this.guest, this.reflection]) stub.close();
  }
}

const sha256 = (bytes) => createHash("sha256").update(bytes).digest("hex");

// The status of a call that has to fail.
async function failure(promise) {
  try {
    await promise;
  } catch (error) {
    return { code: grpc.status[error.code], message: error.details };
  }
  return { code: "OK", message: "" };
}

async function scenario(client) {
  const seen = { services: await client.services() };
  const { guest_image } = await client.unary(client.imager, "ResolveGuestImage", {});
  const box = `node-${randomBytes(4).toString("hex")}`;
  const config = {
    kernel_path: guest_image.kernel_path,
    initramfs_path: guest_image.initramfs_path,
    resources: { memory_mib: 512, vcpus: 1 },
  };
  const created = await client.unary(
    client.hypervisor,
    "CreateBox",
    { box_id: box, config, start_timeout: { seconds: BOOT_MILLISECONDS / 1000 } },
    { milliseconds: BOOT_MILLISECONDS },
  );
  seen.box = { id: created.box.id, state: created.box.state, boot_id: created.box.boot_id };
  try {
    const script = 'cat /proc/sys/kernel/random/boot_id; echo "$WORD" >&2; exit 7';
    const said = await client.exec(box, { program: "sh", args: ["-c", script], env: { WORD: "wört" } });
    seen.exec = { stdout: said.stdout.toString(), stderr: said.stderr.toString(), code: said.exit.exit_code };

    const input = randomBytes(1_000_003);
    const echoed = await client.exec(box, { program: "cat" }, input);
    seen.stdin = { sent: sha256(input), received: sha256(echoed.stdout), bytes: echoed.stdout.length };

    const content = Buffer.from([...Array(100_000).keys()].map((n) => n % 256));
    const written = await client.writeFile(box, "/workspace/bytes", content);
    const read = await client.readFile(box, "/workspace/bytes");
    seen.file = { written: written.size_bytes, sent: sha256(content), received: sha256(read) };

    seen.missing_file = await failure(client.readFile(box, "/workspace/nothing"));
    seen.missing_program = await failure(client.exec(box, { program: "no-such-program" }));
    seen.missing_box = await failure(client.exec("no-such-box", { program: "true" }));
  } finally {
    await client.unary(client.hypervisor, "DeleteBox", { box_id: box, force: true });
  }
  seen.deleted = await failure(client.unary(client.hypervisor, "GetBox", { box_id: box }));
  return seen;
}

const [protos, address, tokenFile] = process.argv.slice(2);
if (!protos || !address) {
  console.error("usage: node client.mjs PROTOS ADDRESS [TOKEN_FILE]");
  process.exit(2);
}
const client = new Client(protos, address, tokenFile ? readFileSync(tokenFile, "utf8").trim() : "");
try {
  console.log(JSON.stringify(await scenario(client)));
} catch (error) {
  console.error(error.stack ?? error);
  process.exitCode = 1;
} finally {
  client.close();
}
