/** `npm run dev`: what it prints is all that a client needs. */
import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer } from "node:net";
import { test } from "node:test";
import { dev } from "./run/dev.ts";
import { connect, Provider } from "./support/sdk-client.ts";
import { freePort, post, runCommandLine } from "./support/server.ts";

const environment = async () => ({
  PORT: String(await freePort()),
  TENANT_PORT: String(await freePort()),
  LOG_LEVEL: "silent",
});

/** The value of `name` among the lines for `.env`. */
function printed(name: string, output: string): string {
  return new RegExp(`^ +${name}=(.+)$`, "m").exec(output)?.[1] ?? assert.fail(`${name} is not in ${output}`);
}

for (const kind of ["permissive", "strict"]) {
  test(`the SDK's client signs in with what is printed for a ${kind} tenant`, async (t) => {
    const lines: string[] = [];
    t.after(await dev(["--tenant", kind], await environment(), (line) => lines.push(line)));
    const output = lines.join("\n");
    const [, url = ""] = /The server is (\S+): give this URL/.exec(output) ?? [];
    const [, email = ""] = /sign in as\n +(\S+@\S+)$/m.exec(output) ?? [];
    const provider = new Provider();
    const client = await connect(url, provider, { email });
    t.after(() => client.close());
    assert.ok((await client.listTools()).tools.length > 0);
    assert.match(output, new RegExp(`stand-in, ${kind}`));

    const domain = printed("AUTH0_DOMAIN", output);
    const metadata = await (await fetch(`${domain}/.well-known/oauth-authorization-server`)).json();
    assert.equal(metadata.authorization_response_iss_parameter_supported, true);
    const grant = {
      grant_type: "client_credentials",
      client_id: printed("AUTH0_CLIENT_ID", output),
      client_secret: printed("AUTH0_CLIENT_SECRET", output),
      audience: printed("MCP_SERVER_URL", output),
    };
    const reply = await fetch(`${domain}/oauth/token`, { method: "POST", body: new URLSearchParams(grant) });
    const { access_token } = await reply.json();
    assert.equal((await post(url, access_token, "ping")).status, 200);
  });
}

test("the command line stays up, and a signal ends it with status 0", async () => {
  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    const { child, outcome } = runCommandLine("dev", [], { env: await environment() });
    const [line] = await once(child.stdout, "data");
    assert.match(String(line), /^The server is http:\/\/localhost:\d+\/mcp: /);
    assert.ok(child.pid);
    process.kill(child.pid, signal); // not child.kill: Deno would then report the signal in place of the status
    assert.equal((await outcome).status, 0);
  }
});

test("the command line says in one line what stops it, and ends with status 1", async (t) => {
  const taken = createServer().listen(0, "127.0.0.1");
  t.after(() => taken.close());
  await once(taken, "listening");
  const { port } = taken.address() as { port: number };
  const free = String(await freePort());
  const line = `Port ${port} is in use: set PORT (the server's) or TENANT_PORT (the tenant's) to another\n`;
  for (const env of [{ PORT: String(port), TENANT_PORT: free }, { PORT: free, TENANT_PORT: String(port) }]) {
    const { status, stderr } = await runCommandLine("dev", [], { env }).outcome;
    assert.deepEqual([status, stderr], [1, line]);
  }
});

test("an unknown argument or tenant is refused, and --help says every option", async () => {
  await assert.rejects(dev(["--brake"], {}, assert.fail), /Unknown option '--brake'/);
  await assert.rejects(
    dev(["--tenant", "lenient"], {}, assert.fail),
    /--tenant must be permissive or strict/,
  );
  const lines: string[] = [];
  await (await dev(["--help"], {}, (line) => lines.push(line)))();
  for (const name of ["--tenant", "--help", "PORT", "TENANT_PORT", "LOG_LEVEL"]) {
    assert.match(lines.join("\n"), new RegExp(`^  ${name} `, "m"));
  }
});
