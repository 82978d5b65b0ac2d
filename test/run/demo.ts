/**
 * `npm run demo`: the whole sign-in and the first tasks, offline, over real HTTP with real tokens.
 *
 * The client of `chatgpt.ts` links the real `server.ts` for two users, through the tenant of `tenant.ts`. Hops have the
 * numbers of the README's diagram.
 *
 * `--break SETTING` leaves one setting of the guide out. It exits with 0 where the user sees what is expected.
 */
import assert from "node:assert/strict";
import http from "node:http";
import { styleText } from "node:util";
import { oneOf, type Print, readOptions, runCommand } from "./command.ts";
import { createServer } from "../../server.ts";
import { Connector, type Hop, publishClientMetadata } from "../support/chatgpt.ts";
import { freePort, startServer } from "../support/server.ts";
import { ALICE, BOB, configuredTenant, FIXED_CLIENT, isStrict, settingsFor } from "../support/tenant.ts";
import { signIn, startTenant, SYMPTOMS, TENANT_KINDS } from "../support/tenant.ts";
import type { ClientKind, SettingName, Tenant, TenantKind, User, Way } from "../support/tenant.ts";

/** What can be changed before the demo starts. */
interface Parts {
  tenant: Tenant;
  /** Environment of the server. */
  environment: { AUTH0_DOMAIN: string; MCP_SERVER_URL: string; ENFORCE_SCOPES?: string };
  /** Creates the server, with a proxy in front of it where a setting needs one. */
  createServer: typeof createServer;
  /** "OIDC enabled" in ChatGPT's form. */
  oidcEnabled: boolean;
}

interface Break {
  /** The beginning of the README's heading that mends it. */
  mendedBy: string;
  about: string;
  /** How ChatGPT becomes a client, where it does not register itself. */
  way?: Way;
  /** For what is no setting of `configuredTenant`: which tenants need it, how it is left out, what the user sees. */
  kinds?: readonly TenantKind[];
  leaveOut?: (parts: Parts) => void;
  symptom?: RegExp;
}

const BREAKS: Record<string, Break> = {
  "registration": { mendedBy: "Step 2b", about: "Dynamic Client Registration is off, as in a new tenant" },
  "application-limit": {
    mendedBy: "Step 2b",
    about: "failed attempts have filled the tenant with applications",
    leaveOut: ({ tenant: { settings } }) => settings.applicationLimit = settings.applications.length,
    symptom: /You reached the limit of entities of this type for this tenant/,
  },
  "default-audience": { mendedBy: "Step 2", about: "the tenant has no Default Audience" },
  "api-identifier": {
    mendedBy: "Step 1",
    about: "the API Identifier ends in a slash, MCP_SERVER_URL does not",
    leaveOut: ({ tenant: { settings } }) => settings.apis.forEach((api) => api.identifier += "/"),
    symptom: /Oops!.*Service not found: http/,
  },
  "offline-access": { mendedBy: "Step 1", about: "Allow Offline Access is off for the API" },
  "connection": { mendedBy: "Step 3", about: "the connection is not promoted to domain level" },
  "action": { mendedBy: "Step 4", about: "the post-login Action is not in the flow" },
  "default-permissions": {
    mendedBy: "Step 1",
    about: "the API has no Default Permissions for third-party applications",
  },
  "oidc": {
    mendedBy: "Step 7",
    about: "OIDC enabled is left ticked in ChatGPT",
    kinds: ["strict"],
    leaveOut: (parts) => parts.oidcEnabled = true,
    symptom: /OAUTH_OWNER_PROFILE_ID_MISSING/,
  },
  "cimd-import": {
    mendedBy: "Step 2b",
    about: "the tenant takes client metadata documents, but ChatGPT's is not imported",
    way: "cimd", // whose document the demo does not import
    symptom: /Oops!.*invalid_request: Unknown client: http.*client\.json/,
  },
  "issuer-response": {
    mendedBy: "Step 2b",
    about: "the tenant promises iss with every answer, and does not send it",
    leaveOut: ({ tenant }) => {
      tenant.settings.includeIssuerInAuthorizationResponses = true;
      tenant.withholdsIssuer = true;
    },
    symptom: /The authorization response has the iss \(none\), expected http/,
  },
  "callback": { mendedBy: "Step 5", about: "the fixed application does not know ChatGPT's callback URL", way: "fixed" },
  "rotation": {
    mendedBy: "Step 5",
    about: "refresh tokens rotate without an overlap period, and ChatGPT refreshes twice at once",
    way: "fixed",
  },
  "bot-rule": {
    mendedBy: "Step 0",
    about: "a bot rule in front of the server turns ChatGPT away, though a browser and curl get through",
    leaveOut: (parts) => parts.createServer = createServerBehindBotRule,
    symptom: /Expected 401, got 403/,
  },
  "server-url": {
    mendedBy: "Step 1",
    about: "MCP_SERVER_URL is not the API Identifier: the URL has changed, the tenant has not",
    leaveOut: ({ environment }) => environment.MCP_SERVER_URL += "/v2",
    symptom: /^401 .*invalid_token.*audience.*expected http\S+\/v2.*README Step 1/,
  },
  "issuer": {
    mendedBy: "Step 0",
    about: "AUTH0_DOMAIN is another domain of the same tenant",
    leaveOut: ({ environment, tenant }) => environment.AUTH0_DOMAIN = tenant.origin.replace("localhost", "127.0.0.1"),
    symptom: /^401 .*invalid_token.*issuer http:\/\/localhost\S+ expected http:\/\/127\.0\.0\.1/,
  },
  "signing-keys": {
    mendedBy: "Step 0",
    about: "the server cannot fetch the tenant's signing keys",
    leaveOut: ({ tenant }) => tenant.answerJwks = (response) => response.writeHead(500).end(),
    symptom: /^503 .*signing keys cannot be had/,
  },
  "permissions": {
    mendedBy: "Permissions per tool",
    about: "ENFORCE_SCOPES is on, RBAC too, and the users have no role",
    kinds: ["permissive"],
    leaveOut: ({ environment, tenant: { settings } }) => {
      environment.ENFORCE_SCOPES = "true";
      settings.apis.forEach((api) => api.enableRbac = true);
    },
    symptom: /^Tool error: Bearer .*insufficient_scope.*tasks:write/,
  },
};

/** Which setting of `configuredTenant` it is, if any. */
const settingOf = (name: string | undefined) => (Object.keys(SYMPTOMS) as SettingName[]).find((one) => one === name);

/** The kinds of tenant that need the setting. */
function kindsOf(name: string, { way = "register", kinds = TENANT_KINDS }: Break): readonly TenantKind[] {
  const setting = settingOf(name);
  return setting ? TENANT_KINDS.filter((tenant) => settingsFor({ tenant, way }).includes(setting)) : kinds;
}

/** As Cloudflare's "Block AI bots" or Bot Fight Mode may do. */
function createServerBehindBotRule(...parameters: Parameters<typeof createServer>): http.Server {
  const server = createServer(...parameters);
  return http.createServer((request, response) => {
    if (/openai-mcp|aiohttp/i.test(request.headers["user-agent"] ?? "")) response.writeHead(403).end();
    else server.emit("request", request, response);
  });
}

const HELP = `npm run demo
  The whole sign-in and the first tasks, offline: the real server, a stand-in for Auth0 and one for ChatGPT.
  Prints each hop between them, and exits 0.

npm run demo -- OPTIONS
  --tenant KIND    permissive (the default) or strict: README, "Which way is yours"
  --break SETTING  leaves one setting of the guide out, and shows what a user then sees and the step that mends it;
                   exits 0 where that is what was expected, 1 otherwise. --break alone lists the settings
  --help           this text`;

/**
 * Runs the demo.
 *
 * @param args The options after `npm run demo --`.
 * @returns The exit status.
 * @throws {Error} With a line for the user.
 */
export async function demo(args: string[], print: Print): Promise<number> {
  const options = readOptions(
    args.at(-1) === "--break" ? [...args, ""] : args,
    { tenant: { type: "string" }, break: { type: "string" } },
    HELP,
    print,
  );
  if (!options) return 0;
  const { break: name } = options;
  const broken = name !== undefined && Object.hasOwn(BREAKS, name) ? BREAKS[name] : undefined;
  if (name !== undefined && !broken) {
    print("Settings that can be left out, npm run demo -- --break SETTING:");
    for (const [name, one] of Object.entries(BREAKS)) {
      const [kind, ...others] = kindsOf(name, one);
      print(`  ${name.padEnd(20)}${one.about}${others.length === 0 ? ` (${kind} tenant)` : ""}`);
    }
    if (name === "") return 0;
    throw new Error(`Unknown setting: ${name}. The known ones are above`);
  }
  const kinds = name !== undefined && broken ? kindsOf(name, broken) : TENANT_KINDS;
  const [usual = "permissive"] = kinds;
  const tenant = oneOf("--tenant", options.tenant ?? usual, TENANT_KINDS);
  if (!kinds.includes(tenant)) {
    throw new Error(`--break ${name} is about a ${usual} tenant: leave --tenant ${tenant} out`);
  }
  return await demonstrate({ tenant, way: broken?.way ?? "register" }, print, broken, settingOf(name));
}

/** Configures everything as the guide says, but for what is left out, and links the server. */
async function demonstrate(client: ClientKind, print: Print, broken?: Break, leftOut?: SettingName): Promise<number> {
  const { tenant: kind, way } = client;
  const tenant = await startTenant({ kind });
  const clientDocuments = way === "cimd" ? await publishClientMetadata() : undefined;
  const mcpServerUrl = `http://localhost:${await freePort()}/mcp`;
  Object.assign(tenant.settings, configuredTenant(kind, mcpServerUrl, way, leftOut));
  const parts: Parts = {
    tenant,
    environment: { AUTH0_DOMAIN: tenant.origin, MCP_SERVER_URL: mcpServerUrl },
    createServer,
    oidcEnabled: !isStrict(client),
  };
  broken?.leaveOut?.(parts);
  const server = await startServer(parts.environment, undefined, parts.createServer);
  try {
    print(`Tenant   ${tenant.issuer} (stand-in, ${kind})`);
    print(`Server   ${server.url}`);
    if (broken) print(`Left out ${broken.about}`);
    const connectorOf = (user: User, fromHop: number) =>
      new Connector({
        mcpServerUrl: server.url,
        browser: (authorizeUrl) => signIn(authorizeUrl, user),
        oidcEnabled: parts.oidcEnabled,
        ...(clientDocuments && { clientDocuments }),
        ...(way === "fixed" && { fixedClient: FIXED_CLIENT }),
        observe: (hop) => hop.number >= fromHop && printHop(hop, print),
      });
    // Only an application made by hand can have an overlap period, for a client that refreshes twice at once.
    const refreshes = way === "fixed" ? 2 : 1;
    const failure = await useTheTools(connectorOf, refreshes, print).then(() => undefined, (error: unknown) => error);
    const symptom = leftOut ? SYMPTOMS[leftOut](client) : broken?.symptom;
    if (broken && symptom) return explain(broken, symptom, failure, tenant, print);
    if (failure !== undefined) throw failure;
    summarize(client, print);
    return 0;
  } finally {
    await server.close();
    await clientDocuments?.close();
    await tenant.close();
  }
}

/** Two users link the server and create a task each. Throws the error that stops a user. */
async function useTheTools(connectorOf: (user: User, fromHop: number) => Connector, refreshes: number, print: Print) {
  const alice = connectorOf(ALICE, 1);
  const bob = connectorOf(BOB, 5);
  try {
    heading("Alice links the server", print);
    await alice.link();
    await createTask(alice, "Buy oat milk");

    heading("Bob links it too (hops 1 to 4 as before)", print);
    await bob.link();
    await createTask(bob, "Water the plants");

    heading("Each lists the tasks", print);
    assert.deepEqual(await listTitles(alice), ["Buy oat milk"]);
    assert.deepEqual(await listTitles(bob), ["Water the plants"]);
    assert.notEqual(alice.profile.id, bob.profile.id);

    heading("Alice's access token is about to expire", print);
    const { refresh_token: used } = alice.tokens;
    const outcomes = await Promise.allSettled(Array.from({ length: refreshes }, () => alice.refresh()));
    for (const outcome of outcomes) if (outcome.status === "rejected") throw outcome.reason;
    assert.ok(alice.tokens.refresh_token !== used, "The refresh token was not rotated");
    assert.deepEqual(await listTitles(alice), ["Buy oat milk"]);
  } finally {
    await alice.close();
    await bob.close();
  }
}

async function createTask(connector: Connector, title: string): Promise<void> {
  const { isError, content, _meta } = await connector.callTool("create_task", { title });
  if (isError) throw new Error(`Tool error: ${_meta?.["mcp/www_authenticate"] ?? JSON.stringify(content)}`);
}

async function listTitles(connector: Connector): Promise<unknown[]> {
  const { structuredContent } = await connector.callTool("list_tasks");
  const { tasks } = structuredContent as { tasks: { title: string }[] };
  return tasks.map(({ title }) => title);
}

const isColoured = process.stdout.isTTY && !process.env.NO_COLOR;
const paint = (format: Parameters<typeof styleText>[0], text: string) => isColoured ? styleText(format, text) : text;

function heading(text: string, print: Print): void {
  print(`\n${paint("bold", text)}`);
}

function printHop({ number, title, asked, answered, failed }: Hop, print: Print): void {
  const mark = failed ? paint("red", "failed  ") : paint("green", "answered");
  print(`  ${number} ${title}\n      asked    ${asked}\n      ${mark} ${answered}`);
}

function summarize(client: ClientKind, print: Print): void {
  heading("Summary", print);
  print(
    "  Two users signed in, each sees only their own tasks, and a refreshed token goes on working.\n" +
      "  The tenant and ChatGPT were stand-ins; the server was server.ts as it stands.",
  );
  if (!isStrict(client)) return;
  print(
    "  One scope, offline_access, was asked for and granted: Auth0 grants a strict client nothing but that and the\n" +
      "  API's own permissions. It does not process OpenID Connect scopes, so OIDC enabled is unticked (README, Step 7).",
  );
}

function explain({ mendedBy }: Break, symptom: RegExp, failure: unknown, tenant: Tenant, print: Print): number {
  const seen = failure instanceof Error ? failure.message : "nothing failed";
  const logged = tenant.logs.findLast(({ type }) => type === "f")?.description;
  const isExpected = symptom.test(seen);
  heading("What the user sees", print);
  print(`  Symptom     ${seen}`);
  if (logged) print(`  Auth0's log ${logged}`);
  print(`  Mended by   README, ${mendedBy}`);
  print(isExpected ? "  As expected when this setting is left out." : paint("red", `  NOT as expected: ${symptom}`));
  return isExpected ? 0 : 1;
}

await runCommand(import.meta.url, demo);
